"""Presets are found by name, have a source, and are counted without allocation."""

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.presets import PRESETS, preset
from moesaic.model.transformer import Transformer


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_builds_on_the_meta_device_as_counted(name):
    made = preset(name)
    assert made.source
    with torch.device("meta"):
        model = Transformer(made.config)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count_parameters(made.config).total


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("zcode-m3-64", 0.05),
        ("nllb-moe-54b", 0.005),
        ("deepseek-moe-16b", 0.02),
        ("deepseek-moe-2b", 0.02),
        ("deepspeed-moe-128", 0.03),
        ("pr-moe-350m", 0.03),
        ("trillion-384", 0.04),
    ],
)
def test_the_counted_size_is_the_published_size(name, apart):
    made = preset(name)
    assert made.published
    for number in made.published:
        counted = count_parameters(made.config)
        found = {"total": counted.total, "active": counted.active}[number.quantity]
        assert found == pytest.approx(number.value, rel=apart)


def test_the_dense_base_of_zcode_counts_less_than_published():
    made = preset("zcode-m3")
    total = count_parameters(made.config).total
    assert "vocab_size" in made.guessed
    assert 0.6e9 < total < made.published[0].value


def test_doubling_the_experts_doubles_them():
    half, whole = (count_parameters(preset(f"zcode-m3-{n}").config) for n in (64, 128))
    assert whole.parts["encoder experts"] == 2 * half.parts["encoder experts"]
    assert whole.total > 19e9


def test_pr_moe_has_less_than_a_third_of_the_experts():
    uniform, pyramid = (
        count_parameters(preset(n).config) for n in ("deepspeed-moe-128", "pr-moe-350m")
    )
    assert pyramid.parts["decoder experts"] * 12 * 128 == uniform.parts["decoder experts"] * 448
    assert pyramid.active > uniform.active  # by what stands beside the experts


def test_guesses_name_fields_that_exist():
    for name in PRESETS:
        made = preset(name)
        for path in made.guessed:
            value = made.config.to_dict()
            for step in path.split("."):
                if value.get("kind") == "NoMoE":  # the dense base has no mixture to guess about
                    break
                assert step in value, path
                value = value[step]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="zcode-m3-64"):
        preset("zcode-m3-46")
