"""Directories as transformers writes them: names and shapes as its files have them, by hand."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.core.shapes import Tensor

DIM, HIDDEN, EXPERTS, VOCABULARY = 16, 12, 3, 40
MIXTRAL_CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}


def mixtral_shapes(layout: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of ``MIXTRAL_CONFIG``."""
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, DIM),
        "model.embed_tokens.weight": (VOCABULARY, DIM),
        "model.norm.weight": (DIM,),
    }
    for layer in range(2):
        of = f"model.layers.{layer}."
        shapes[f"{of}input_layernorm.weight"] = (DIM,)
        shapes[f"{of}post_attention_layernorm.weight"] = (DIM,)
        for name, width in (("q", DIM), ("k", DIM // 2), ("v", DIM // 2), ("o", DIM)):
            shapes[f"{of}self_attn.{name}_proj.weight"] = (width, DIM)
        if layout == "fused":
            shapes[f"{of}mlp.gate.weight"] = (EXPERTS, DIM)
            shapes[f"{of}mlp.experts.gate_up_proj"] = (EXPERTS, 2 * HIDDEN, DIM)
            shapes[f"{of}mlp.experts.down_proj"] = (EXPERTS, DIM, HIDDEN)
            continue
        shapes[f"{of}block_sparse_moe.gate.weight"] = (EXPERTS, DIM)
        for expert in range(EXPERTS):
            inside = f"{of}block_sparse_moe.experts.{expert}."
            shapes[f"{inside}w1.weight"] = shapes[f"{inside}w3.weight"] = (HIDDEN, DIM)
            shapes[f"{inside}w2.weight"] = (DIM, HIDDEN)
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }


def write_directory(
    path: Path, tensors: Mapping[str, Tensor], *, config: Mapping[str, object] = MIXTRAL_CONFIG
) -> Path:
    """Write config and weights, in two files with an index."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_tensors(path / file, tensors={name: tensors[name] for name in part})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
