"""Layers with a window, without rotary positions or with experts are those of transformers."""

import pytest

from moesaic.core.errors import ConfigError
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


LLAMA4, ERNIE = "llama4_text", "ernie4_5_moe"
LISTED = {"num_local_experts": 2, "moe_num_experts": 2, "moe_k": 1}
LAYERS = [  # of five layers: those without rotary positions, and those with experts
    (LLAMA4, {}, [3], [0, 1, 2, 3, 4]),
    (LLAMA4, {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2}, [1, 3], [1, 3]),
    (LLAMA4, {"no_rope_layers": [0, 1, 1, 1, 0], "moe_layers": [2, 4]}, [0, 4], [2, 4]),
    (ERNIE, {}, [], [1, 2, 3, 4]),
    (ERNIE, {"moe_layer_start_index": 2, "moe_layer_end_index": 3}, [], [2, 3]),
    (ERNIE, {"moe_layer_start_index": 0, "moe_layer_interval": 2}, [], [1, 3]),
]


@pytest.mark.parametrize(("family", "changes", "without_rotary", "sparse"), LAYERS)
def test_layers_are_found_by_lists_and_by_steps(family, changes, without_rotary, sparse):
    mapping = FAMILIES[family].mapping
    model = mapping.read(SIZES | LISTED | changes)
    names = [model.decoder.block_pattern(i).branches[0][0] for i in range(5)]
    assert [i for i, name in enumerate(names) if name == "no_rotary"] == without_rotary
    assert list(model.decoder.moe_layers) == sparse
    again = mapping.read(SIZES | LISTED | mapping.write(model))
    assert list(again.decoder.moe_layers) == sparse
    assert again.mixers == model.mixers


def test_chunks_on_other_layers_than_those_that_rotate_are_refused():
    kinds = {"layer_types": ["chunked_attention"] * 5}
    with pytest.raises(ConfigError, match=r"layer_types: found .*, expected chunked_attention"):
        FAMILIES[LLAMA4].mapping.read(SIZES | LISTED | kinds)
