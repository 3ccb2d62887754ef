"""Patterns choose the mixers of blocks; what does not fit is refused with a sentence."""

import re
from pathlib import Path

import pytest
import torch

from mixer_cases import MIXERS
from model.samples import BASE, NONE, batch_for
from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.mixer_pattern import parse_pattern
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.model.transformer import Transformer
from moesaic.nn.attention import Attention
from moesaic.parallel.pipeline_stages import block_costs

SOURCE = Path(__file__).parents[2] / "src" / "moesaic"
SHIFT = {"shift": MIXERS["of_the_guide"], "narrow": Attention(heads=2)}


def _model(pattern: str, **fields: object) -> ModelConfig:
    decoder = Stack(layers=4, moe_every=2, pattern=pattern)
    return BASE.replace(mixers=SHIFT, decoder=decoder, **fields)


@pytest.mark.parametrize(
    ("text", "branches"),
    [
        ("a", [(("a",),)]),
        ("a, b", [(("a",),), (("b",),)]),
        ("a > b | c", [(("a",), ("b", "c"))]),
        (" a|b > c - ", [(("a", "b"), ("c",))]),
    ],
)
def test_a_pattern_lists_the_branches_of_each_block(text, branches):
    blocks = parse_pattern(text)
    assert [block.branches for block in blocks] == branches
    assert [block.feed_forward for block in blocks] == [not text.strip().endswith("-")] * len(
        blocks
    )
    assert parse_pattern(", ".join(map(str, blocks))) == blocks


def test_a_pattern_is_repeated_over_the_blocks():
    model = Transformer(_model("attention, shift > narrow-"))
    names = [block.mixer_names for block in model.decoder]
    assert names == [("self_attention",), ("guide_token_shift", "self_attention")] * 2
    assert [block.feed_forward is None for block in model.decoder] == [False, True] * 2


def test_a_block_without_feed_forward_has_no_experts():
    config = _model("attention, shift-")  # every second block would have some
    assert config.decoder.moe_layers == ()
    assert len(Transformer(config)(batch_for(config)).records) == 1  # of the encoder


def test_two_mixers_of_a_kind_have_names_and_dropout_masks_of_their_own():
    model = Transformer(_model("attention > narrow > attention", dropout=0.1))
    branches = model.decoder[0].mixer_branches
    assert model.decoder[0].mixer_names == (
        "self_attention",
        "self_attention_2",
        "self_attention_3",
    )
    masks = [module.name for module in model.modules() if type(module).__name__ == "Dropout"]
    assert len(set(masks)) == len(masks)
    assert len({branch.dropout.name for branch in branches}) == 3


def test_outputs_are_scaled_by_the_number_of_residual_branches():
    torch.manual_seed(0)
    config = _model("attention > shift-", encoder=NONE, dim=64)
    weight = Transformer(config).decoder[0].self_attention.inner.out.weight
    assert weight.std().item() == pytest.approx(64**-0.5 * 8**-0.5, rel=0.1)


def test_the_cost_of_every_block_is_that_of_its_mixers():
    config = _model("attention, shift, attention > shift, narrow-", encoder=NONE)
    sizes = BatchDims(source=0, target=16)
    *costs, last = block_costs(config, sizes=sizes)
    whole = count_parameters(config).forward_flops(sizes)
    assert sum(costs) + last == pytest.approx(whole)
    assert costs[2] > costs[0]


REFUSED = {
    "a pattern without a name": ("attention,, shift", r"names of mixers separated by commas"),
    "an unknown mixer": (
        "atten",
        r"'atten' in a pattern, expected one of attention, shift, narrow .*mean",
    ),
    "a sign that means nothing": ("attention+shift", r"each block such as a, a > b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_pattern_is_refused_with_what_is_expected(case):
    text, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected):
        _model(text)


def test_a_causal_mixer_is_refused_in_an_encoder():
    with pytest.raises(ConfigError, match=r"GuideTokenShift of encoder.pattern expects a decoder"):
        BASE.replace(mixers=SHIFT, encoder=Stack(layers=2, pattern="shift"))


def test_a_mixer_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"Attention of decoder.pattern expects .*heads=5"):
        BASE.replace(
            mixers={"odd": Attention(heads=5, kv_heads=5)}, decoder=Stack(layers=1, pattern="odd")
        )


def test_only_attention_asks_if_a_module_is_attention():
    """Everything else asks the methods of ``SequenceMixer`` and ``ShardableModule``."""
    question = re.compile(
        r"isinstance\([^()]*\b\w*(?:Attention|Mixture|Mixers?|MixerModule|Mamba2)\b"
    )
    asked = [
        f"{path.relative_to(SOURCE)}: {found[0]}"
        for path in sorted(SOURCE.rglob("*.py"))
        for found in question.finditer(path.read_text(encoding="utf-8"))
        if path.name != "attention.py"
    ]
    assert not asked
