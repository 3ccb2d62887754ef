"""Without ``layer_types`` the layers with a window are those of transformers."""

import pytest

from moesaic.exchange.families import FAMILIES

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "vocab_size": 9,
    "num_hidden_layers": 5,
    "num_attention_heads": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4,
    "use_sliding_window": True,
    "sliding_window": 3,
}
CASES = [  # layers with a window of five, by max_window_layers; None: the key is absent
    ("qwen2", 2, [2, 3, 4]),
    ("qwen3", 2, [2, 3, 4]),
    ("qwen2", 0, [0, 1, 2, 3, 4]),
    ("qwen2", None, []),
    ("qwen2_moe", 4, [0, 2]),
    ("qwen2_moe", 0, []),
    ("qwen2_moe", None, [0, 2, 4]),
]


@pytest.mark.parametrize(("family", "most", "wanted"), CASES)
def test_layers_that_no_list_names_have_the_windows_of_transformers(family, most, wanted):
    found = SIZES if most is None else SIZES | {"max_window_layers": most}
    mapping = FAMILIES[family].mapping
    kinds = mapping.write(mapping.read(found))["layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "sliding_attention"] == wanted


@pytest.mark.parametrize(("family", "most", "wanted"), CASES)
def test_transformers_names_these_layers(family, most, wanted):
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    found = SIZES if most is None else SIZES | {"max_window_layers": most}
    kinds = transformers.AutoConfig.for_model(family, **found).layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "sliding_attention"] == wanted
