"""Rotary scalings equal the formulas of their papers, pair by pair and in plain Python."""

import math

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.rotary_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    NoRotaryScaling,
    NTKScaling,
    RotaryScaling,
    YaRN,
)

PAIRS, THETA, ORIGINAL = 8, 500.0, 16
LENGTHS = [3, 16, 17, 60]
SHORT, LONG = [tuple(1 + at * pair for pair in range(PAIRS)) for at in (0.1, 0.7)]


def unscaled(pair, theta=THETA):
    return theta ** (-pair / PAIRS)


def dynamic(pair, length):
    growth = max(1.0, 4 * length / ORIGINAL - 3)
    return unscaled(pair, THETA * growth ** (2 * PAIRS / (2 * PAIRS - 2)))


def yarn(pair, _length):
    turns = ORIGINAL * unscaled(pair) / (2 * math.pi)  # within the original length

    def pair_with(turns):
        return 2 * PAIRS * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = math.floor(pair_with(2.0)), math.ceil(pair_with(0.25))
    assert pair_with(turns) == pytest.approx(pair)
    slow = min(max((pair - low) / (high - low), 0), 1)
    return unscaled(pair) * (slow / 4 + 1 - slow)


def llama3(pair, _length):
    wave = 2 * math.pi / unscaled(pair)
    if wave < ORIGINAL / 4:
        return unscaled(pair)
    if wave > ORIGINAL / 0.5:
        return unscaled(pair) / 8
    smooth = (ORIGINAL / wave - 0.5) / (4 - 0.5)
    return (1 - smooth) * unscaled(pair) / 8 + smooth * unscaled(pair)


SCALINGS = {
    "none": (NoRotaryScaling(), lambda pair, _: unscaled(pair)),
    "linear": (LinearScaling(factor=4), lambda pair, _: unscaled(pair) / 4),
    "ntk": (NTKScaling(factor=4), lambda pair, _: unscaled(pair, THETA * 4 ** (16 / 14))),
    "dynamic": (DynamicNTKScaling(factor=4, original_length=ORIGINAL), dynamic),
    "yarn": (YaRN(factor=4, original_length=ORIGINAL, beta_fast=2, beta_slow=0.25), yarn),
    "llama3": (Llama3Scaling(factor=8, original_length=ORIGINAL, low_freq_factor=0.5), llama3),
    "longrope": (
        LongRoPE(factor=4, original_length=ORIGINAL, short_factors=SHORT, long_factors=LONG),
        lambda pair, length: unscaled(pair) / (LONG if length > ORIGINAL else SHORT)[pair],
    ),
}


def test_every_scaling_is_tested():
    assert {type(scaling) for scaling, _ in SCALINGS.values()} == set(
        RotaryScaling.members.values()
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_the_angle_of_every_pair_is_position_times_the_scaled_frequency(name):
    scaling, frequency = SCALINGS[name]
    position, length = torch.tensor([2, 15, 9, 59]), torch.tensor(LENGTHS)
    rotary = Rotary(theta=THETA, scaling=scaling)
    unit = torch.tensor([1.0, 0.0]).repeat(PAIRS)
    turned = rotary.rotation(position, head_dim=2 * PAIRS, length=length)(unit.expand(4, 1, -1))[
        :, 0
    ]
    for row, (at, tokens) in enumerate(zip(position.tolist(), LENGTHS, strict=True)):
        for pair in range(PAIRS):
            angle, size = at * frequency(pair, tokens), scaling.magnitude()
            want = torch.tensor([size * math.cos(angle), size * math.sin(angle)])
            got = turned[row, 2 * pair : 2 * pair + 2]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_magnitudes_are_those_of_the_papers():
    assert YaRN(factor=40, original_length=4096).magnitude() == pytest.approx(
        0.1 * math.log(40) + 1
    )
    assert YaRN(factor=40, original_length=4096, attention_factor=1.5).magnitude() == 1.5
    deepseek = YaRN(factor=40, original_length=4096, mscale=0.7, mscale_all_dim=1.0)
    assert deepseek.magnitude() == pytest.approx(
        (0.07 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    )
    assert deepseek.score_factor() == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert SCALINGS["longrope"][0].magnitude() == pytest.approx(math.sqrt(1.5))


def test_gpt_oss_ramps_between_fractions_of_pairs():
    exact = YaRN(factor=4, original_length=ORIGINAL, beta_fast=2, beta_slow=0.25, ramp_ends="exact")
    whole = exact.replace(ramp_ends="whole")
    arguments = {"theta": THETA, "length": None, "device": torch.device("cpu")}
    differ = exact.frequencies(PAIRS, **arguments) != whole.frequencies(PAIRS, **arguments)
    assert differ.any()
    assert not differ[0, 0]


def test_halves_are_a_permutation_of_neighbouring_pairs():
    position, heads = torch.tensor([0, 3, 11]), torch.randn(3, 2, 2 * PAIRS)
    places = torch.arange(2 * PAIRS).view(PAIRS, 2).T.flatten()  # where a pair's channels go
    neighbours = Rotary().rotation(position, head_dim=2 * PAIRS)(heads)
    halves = Rotary(pairing="halves").rotation(position, head_dim=2 * PAIRS)
    assert torch.equal(halves(heads[..., places]), neighbours[..., places])


@pytest.mark.parametrize("pairing", ["neighbouring", "halves"])
def test_partial_rotary_rotates_the_first_channels_as_a_narrower_head(pairing):
    position, heads = torch.tensor([0, 3, 11]), torch.randn(3, 2, 16)
    part = Rotary(pairing=pairing, fraction=0.25).rotation(position, head_dim=16)
    narrow = Rotary(pairing=pairing).rotation(position, head_dim=4)
    got = part(heads)
    assert torch.equal(got[..., 4:], heads[..., 4:])
    assert torch.equal(got[..., :4], narrow(heads[..., :4]))


def test_wrong_fractions_and_factors_are_refused():
    assert "head_dim=16 with fraction=0" in str(Rotary(fraction=0.2).problems(16))
    assert "at least 2 pairs" in str(Rotary(scaling=NTKScaling(factor=2)).problems(2))
    long = LongRoPE(factor=2, original_length=8, short_factors=(1.0,), long_factors=(1.0,))
    wanted = "8 short_factors and long_factors, one per pair"
    assert wanted in str(Rotary(scaling=long).problems(16))
    with pytest.raises(ConfigError, match="high_freq_factor"):
        Llama3Scaling(factor=2, original_length=8, low_freq_factor=4, high_freq_factor=1)
    with pytest.raises(TypeError, match="length"):
        Rotary(scaling=SCALINGS["dynamic"][0]).rotation(torch.tensor([1]), head_dim=16)
