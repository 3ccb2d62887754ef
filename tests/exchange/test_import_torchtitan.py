"""Checkpoints with torchtitan's names are imported as the Hugging Face model that they are of."""

import re

import pytest
import torch

pytest.importorskip("transformers")
import torch.distributed.checkpoint as dcp
from transformers_models import MODELS, save_per_expert

from moesaic.checkpoint.safetensors_io import read_tensors
from moesaic.core.errors import CheckpointError
from moesaic.exchange.import_model import import_model

MATRICES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
NAMES = (
    (r"^model\.embed_tokens", "tok_embeddings"),
    (r"^model\.", ""),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.([qkv])_proj", r"attention.qkv_linear.w\1"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"self_attn\.q_([ab])_proj", r"attention.wq_\1"),
    (r"self_attn\.kv_a_proj_with_mqa", "attention.wkv_a"),
    (r"self_attn\.kv_b_proj", "attention.wkv_b"),
    (r"self_attn\.kv_a_layernorm", "attention.kv_norm"),
    (r"self_attn\.q_a_layernorm", "attention.q_norm"),
    (r"self_attn\.([qk])_norm", r"attention.\1_norm"),
    (r"mlp\.gate\.weight", "moe.router.gate.weight"),
    (r"mlp\.gate\.e_score_correction_bias", "moe.expert_bias_E"),
    (r"mlp\.shared_experts", "moe.shared_experts"),
    (r"mlp\.", "feed_forward."),
    *MATRICES,
)


def as_torchtitan(tensors, *, heads):
    """Rename and stack tensors as torchtitan's adapter does, for Llama with its order of rows."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"model\.(.*)\.mlp\.experts\.(\d+)\.(\w+)\.weight", name):
            matrix = dict(MATRICES)[match[3]]
            dims = "EDF" if matrix == "w2" else "EFD"
            key = f"{match[1]}.moe.routed_experts.inner_experts.{matrix}_{dims}"
            experts.setdefault(key, {})[int(match[2])] = tensor
            continue
        number = next((n for part, n in heads.items() if f".{part}_proj." in name), None)
        if number is not None:
            rows, columns = tensor.shape
            halves = tensor.view(number, 2, rows // number // 2, columns)
            tensor = halves.transpose(1, 2).reshape(rows, columns)
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    stacked = {key: torch.stack([of[e] for e in sorted(of)]) for key, of in experts.items()}
    return found | stacked


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
def test_a_checkpoint_of_torchtitan_is_the_model_of_hugging_face(kind, tmp_path):
    save_per_expert(model := MODELS[kind].build(), tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=tmp_path / "ours")
    files = (tmp_path / "theirs").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    config = model.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    titan = as_torchtitan(tensors, heads=heads if kind == "llama" else {})
    assert not set(titan) & set(tensors) - {"lm_head.weight"}
    state = {**titan, "optimizer": {"norm.weight": {"exp_avg": torch.ones(2)}}}
    dcp.save(state, checkpoint_id=tmp_path / "titan", no_dist=True)
    (tmp_path / "titan/config.json").write_bytes((tmp_path / "theirs/config.json").read_bytes())
    import_model(tmp_path / "titan", out=tmp_path / "again")
    ours, again = (read_tensors(tmp_path / p / "model.safetensors") for p in ("ours", "again"))
    assert ours.keys() == again.keys()
    assert all(ours[name].equal(again[name]) for name in ours)


def test_two_tensors_with_one_name_are_refused(tmp_path):
    save_per_expert(MODELS["llama"].build(), tmp_path)
    both = {"tok_embeddings.weight": torch.ones(4, 2)}
    both |= dict.fromkeys(("output.weight", "lm_head.weight"), torch.ones(4, 2))
    dcp.save(both, checkpoint_id=tmp_path / "titan", no_dist=True)
    (tmp_path / "titan/config.json").write_bytes((tmp_path / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*is there twice"):
        import_model(tmp_path / "titan", out=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
