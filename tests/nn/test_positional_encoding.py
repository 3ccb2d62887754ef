"""Positional encodings equal the formulas of their papers; each either adds or rotates."""

import pytest
import torch

from moesaic.nn.positional_encoding import (
    LearnedPositions,
    NoPositionalEncoding,
    Rotary,
    Sinusoidal,
)

PLACE = torch.tensor([0, 1, 2, 5])


def test_rotary_rotates_each_pair_by_its_angle():
    heads = torch.randn(4, 3, 6)
    got = Rotary(theta=100.0).rotation(PLACE, head_dim=6)(heads)
    for t, place in enumerate(PLACE.tolist()):
        for pair in range(3):
            angle = torch.tensor(place * 100.0 ** (-pair / 3))
            c, s = angle.cos(), angle.sin()
            a, b = heads[t, :, 2 * pair], heads[t, :, 2 * pair + 1]
            torch.testing.assert_close(got[t, :, 2 * pair], a * c - b * s)
            torch.testing.assert_close(got[t, :, 2 * pair + 1], a * s + b * c)


def test_rotary_scores_depend_on_distance_only():
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(i, j):
        turned = [
            Rotary().rotation(torch.tensor([p]), head_dim=8)(v) for p, v in ((i, query), (j, key))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(13, 11), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(3, 1), score(3, 2))


def test_rotary_keeps_the_dtype_and_refuses_odd_heads():
    turned = Rotary().rotation(PLACE, head_dim=8)(torch.randn(4, 1, 8).bfloat16())
    assert turned.dtype == torch.bfloat16
    assert "head_dim=5" in str(Rotary().problems(5))


def test_an_offset_moves_the_first_position():
    x = torch.randn(4, 8)
    moved = Sinusoidal(offset=2).build(8).add(x, PLACE)
    assert torch.equal(moved, Sinusoidal().build(8).add(x, PLACE + 2))


def test_sinusoidal_adds_the_wave_of_each_position():
    x = torch.zeros(4, 8)
    wave = Sinusoidal().build(8).add(x, PLACE)
    torch.testing.assert_close(wave[:, 0], PLACE.float().sin())
    torch.testing.assert_close(wave[:, 4], PLACE.float().cos())
    assert Sinusoidal().build(7).add(torch.zeros(4, 7), PLACE).shape == (
        4,
        7,
    )


def test_learned_looks_up_a_vector_per_position():
    module = LearnedPositions(max_length=6).build(8)
    table = next(module.parameters())
    assert table.numel() == 6 * 8
    assert torch.equal(module.add(torch.zeros(4, 8), PLACE), table[PLACE])


@pytest.mark.parametrize(
    "position", [NoPositionalEncoding(), Sinusoidal(), LearnedPositions()], ids=repr
)
def test_an_additive_encoding_does_not_rotate(position):
    heads = torch.randn(4, 2, 4)
    assert position.rotation(PLACE, head_dim=4)(heads) is heads


def test_no_positional_encoding_changes_no_embedding():
    x = torch.randn(4, 8)
    assert NoPositionalEncoding().build(8).add(x, PLACE) is x
