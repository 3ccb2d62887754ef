"""Integer spikes are the sums of their events, exactly; gradients are those of the norm."""

import pytest
import torch
from torch import nn

from moesaic.nn.norm import RMSNorm
from moesaic.nn.spike_coding import (
    BinarySpikes,
    BitwiseSpikes,
    IntegerSpikes,
    RealValues,
    SpikeCoding,
    SpikeCounts,
    SpikingNorm,
    TernarySpikes,
)

CODINGS = [BinarySpikes(), TernarySpikes(), BitwiseSpikes()]


def _normal() -> torch.Tensor:
    return torch.randn(7, 33, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: type(coding).__name__)
@pytest.mark.parametrize("k", [0.5, 2.0, 9.0])
def test_the_events_of_a_channel_add_up_to_its_integer(coding: SpikeCoding, k: float) -> None:
    signed = not isinstance(coding, BinarySpikes)
    counts = SpikeCounts.of(_normal() if signed else _normal().abs(), k=k).count
    events = coding.events(counts)
    assert torch.equal(events.counts(), counts)
    assert events.event.abs().max() <= 1
    assert signed or events.event.min() == 0


def test_a_linear_map_of_events_is_that_of_the_integers() -> None:
    counts = SpikeCounts.of(_normal(), k=3.0).count
    weight = torch.randint(-8, 9, (33, 5), generator=torch.Generator().manual_seed(1))
    events = BitwiseSpikes().events(counts)
    by_step = (events.event @ weight) * events.weight[:, None, None]
    assert torch.equal(by_step.sum(0), counts @ weight)


def test_bits_need_fewer_steps_than_units() -> None:
    counts = SpikeCounts.of(_normal(), k=8.0).count
    units, bits = TernarySpikes().events(counts), BitwiseSpikes().events(counts)
    assert len(units.weight) == counts.abs().max()
    assert len(bits.weight) == int(counts.abs().max()).bit_length()
    assert units.sparsity() > bits.sparsity() > 0


def test_a_spiking_norm_is_close_to_the_norm_and_has_its_gradient() -> None:
    norm = RMSNorm().build(33)
    spiking = IntegerSpikes(k=4.0).after(norm)
    assert isinstance(spiking, SpikingNorm)
    x, grad = _normal().requires_grad_(), torch.ones(7, 33)
    half = SpikeCounts.of(norm(x).detach(), k=4.0).threshold / 2
    assert ((spiking(x) - norm(x)).abs() <= half + 1e-6).all()
    counts = spiking.counts(x.detach())
    torch.testing.assert_close(counts.values(), spiking(x).detach())
    (found,) = torch.autograd.grad(spiking(x), x, grad)
    (expected,) = torch.autograd.grad(norm(x), x, grad)
    assert torch.equal(found, expected)


def test_what_has_no_spikes_is_left_alone() -> None:
    assert SpikeCounts.of(torch.zeros(2, 3), k=1.0).values().eq(0).all()
    assert TernarySpikes().events(torch.zeros(2, 3).long()).counts().eq(0).all()
    norm = nn.Identity()
    assert RealValues().after(norm) is norm
    with pytest.raises(ValueError, match="no sign"):
        BinarySpikes().events(torch.tensor([[-1]]))
