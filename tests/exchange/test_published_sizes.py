"""Configs of published models are read, and have the parameters that their names say."""

import pytest

from moesaic.exchange.families import FAMILIES
from moesaic.model.parameter_flop_count import count_parameters

SCOUT = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
}
GLM = {
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "num_experts_per_tok": 8,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 1,
}
AIR = GLM | {
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "n_routed_experts": 128,
}
LARGE = GLM | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "n_routed_experts": 160,
    "first_k_dense_replace": 3,
    "use_qk_norm": True,
}
MINIMAX = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}
ERNIE = {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_num_experts": 64,
}
PUBLISHED = {  # billions of parameters: all, and those that a token uses
    "Llama 4 Scout (text)": ("llama4_text", SCOUT, 108, 17),
    "Llama 4 Maverick (text)": (
        "llama4_text",
        SCOUT | {"num_local_experts": 128, "interleave_moe_layer_step": 2},
        400,
        17,
    ),
    "GLM-4.5-Air": ("glm4_moe", AIR, 106, 12),
    "GLM-4.5": ("glm4_moe", LARGE, 355, 32),
    "MiniMax-M2": ("minimax_m2", MINIMAX, 230, 10),
    "ERNIE-4.5-21B-A3B": ("ernie4_5_moe", ERNIE, 21, 3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_parameters_of_its_name(name):
    family, config, total, active = PUBLISHED[name]
    model = FAMILIES[family].mapping.read(config)
    counts = count_parameters(model)
    assert model.position.fraction == (0.5 if family in ("glm4_moe", "minimax_m2") else 1)
    assert counts.total / 1e9 == pytest.approx(total, rel=0.05)
    assert counts.active / 1e9 == pytest.approx(active, rel=0.15)
