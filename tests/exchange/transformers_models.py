"""Small models of transformers with random weights, one for each family and variant."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_tensors
from moesaic.exchange.families import FAMILIES
from moesaic.exchange.import_model import import_model
from moesaic.exchange.same_model import resolved
from moesaic.serve.open_run import read_model_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class TheirModel:
    """A class of transformers and what its config says beside ``SIZES``."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def build(self, **changes: Any) -> Any:
        """Return the model with weights away from their initial values."""
        import transformers

        made = getattr(transformers, f"{self.name}ForCausalLM")
        model = made(made.config_class(**SIZES | self.changes | changes)).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                one = parameter.dim() == 1
                parameter.normal_(1.0 if one else 0.0, 0.3 if one else 0.2)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    buffer.normal_(0.0, 0.3)
        return model


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
LLAMA4 = {
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "head_dim": 12,
    "attention_chunk_size": 5,
    "floor_scale": 3,
    "attn_scale": 0.5,
    "no_rope_layer_interval": 2,
}
GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}
ERNIE = {
    "num_hidden_layers": 3,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
}
MODELS = {
    "mixtral": TheirModel("Mixtral", {"num_local_experts": 4}),
    "mixtral with a window": TheirModel(
        "Mixtral", {"num_local_experts": 4, "sliding_window": 6, "head_dim": 12}
    ),
    "qwen3_moe": TheirModel("Qwen3Moe", EXPERTS | {"head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe, a dense layer, tied, yarn": TheirModel(
        "Qwen3Moe",
        EXPERTS
        | {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
            "rope_parameters": YARN,
        },
    ),
    "qwen2_moe": TheirModel("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 48}),
    "olmoe": TheirModel(
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.7, "pad_token_id": None},
    ),
    "granitemoe": TheirModel("GraniteMoe", {"num_local_experts": 4} | GRANITE),
    "deepseek_v2": TheirModel("DeepseekV2", LATENT | {"n_shared_experts": 2}),
    "deepseek_v2, groups, yarn, no latent queries": TheirModel(
        "DeepseekV2",
        LATENT
        | {
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 3.0,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
        },
    ),
    "deepseek_v3": TheirModel(
        "DeepseekV3",
        LATENT | {"n_group": 2, "topk_group": 1, "rope_parameters": YARN | {"mscale_all_dim": 1.0}},
    ),
    "deepseek_v3, unnormalised, halves": TheirModel(
        "DeepseekV3",
        LATENT | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "gpt_oss": TheirModel(
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "head_dim": 12,
            "sliding_window": 5,
            "swiglu_limit": 1.5,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "llama4_text": TheirModel("Llama4", LLAMA4),
    "llama4_text, two experts, dense layers, no norm of heads, llama3": TheirModel(
        "Llama4",
        LLAMA4
        | {
            "num_experts_per_tok": 2,
            "moe_layers": [1, 3],
            "no_rope_layers": [0, 1, 1, 0],
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "rope_parameters": LLAMA3,
        },
    ),
    "glm4_moe": TheirModel("Glm4Moe", GLM),
    "glm4_moe, groups, norms of heads, biases": TheirModel(
        "Glm4Moe",
        GLM
        | {
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.25},
        },
    ),
    "minimax_m2": TheirModel(
        "MiniMaxM2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4, "head_dim": 8},
    ),
    "ernie4_5_moe": TheirModel("Ernie4_5_Moe", ERNIE | {"tie_word_embeddings": False}),
    "ernie4_5_moe, tied, every second layer": TheirModel(
        "Ernie4_5_Moe", ERNIE | {"num_hidden_layers": 4, "moe_layer_interval": 2}
    ),
    "llama": TheirModel("Llama", {"rope_parameters": LLAMA3}),
    "granite": TheirModel("Granite", GRANITE | {"tie_word_embeddings": True}),
    "mistral": TheirModel("Mistral", {"sliding_window": 5, "tie_word_embeddings": True}),
    "qwen2": TheirModel("Qwen2"),
    "qwen3": TheirModel(
        "Qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
}
ONE_LAYOUT = ("gpt_oss", "llama4_text", "llama", "granite", "mistral", "qwen2", "qwen3")
Save = Callable[[Any, Path], None]


def save_per_expert(model: Any, path: Path) -> None:
    """Save a model with the names of transformers 4."""
    model.save_pretrained(path)


def save_fused(model: Any, path: Path) -> None:
    """Save a model with the names of transformers 5, in several files."""
    model.save_pretrained(path, save_original_format=False, max_shard_size="20KB")


def layout_of(model: Any, saved: str) -> str:
    """Return the name of the layout that a family has for one of ``LAYOUTS``."""
    layouts = list(FAMILIES[model.config.model_type].layouts)
    return layouts[0 if saved == "per-expert" else -1]


LAYOUTS: dict[str, Save] = {"per-expert": save_per_expert, "fused": save_fused}


def assert_exported_alike(theirs: Any, loader: Any, path: Path) -> None:
    """Their weights come back from ``exported``, and ``ours`` from importing that again."""
    again, info = loader.from_pretrained(
        path / "exported", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    for key, tensor in theirs.state_dict().items():
        assert again.state_dict()[key].equal(tensor), key
    import_model(path / "exported", out=path / "once more")
    before, after = (read_tensors(path / p / "model.safetensors") for p in ("ours", "once more"))
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    one, two = (read_model_config(RunDir(path / p)) for p in ("ours", "once more"))
    assert resolved(one) == resolved(two)
