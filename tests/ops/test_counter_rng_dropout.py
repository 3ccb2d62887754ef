"""The dropout mask depends on the key alone and has the given rate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.ops.counter_rng import dropout, dropout_mask
from ops.references import reference_dropout_mask

KEYS = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
RATES = st.floats(1e-6, 0.999999)


@given(width=st.integers(1, 9), rate=RATES)
def test_four_channels_of_a_hash_are_those_of_the_definition(width: int, rate: float) -> None:
    fast = dropout_mask(torch.empty(len(KEYS), width), key=KEYS, rate=rate)
    assert torch.equal(fast, reference_dropout_mask(KEYS, width=width, rate=rate))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_channels_are_dropped_at_the_rate_and_independently(rate: float) -> None:
    keys = torch.arange(20000)
    lost = dropout_mask(torch.empty(len(keys), 8), key=keys, rate=rate).double()
    spread = (rate * (1 - rate) / len(keys)) ** 0.5
    assert (lost.mean(0) - rate).abs().max() < 5 * spread
    both = lost.T @ lost / len(keys)
    off = both[~torch.eye(8, dtype=torch.bool)]
    assert (off - rate**2).abs().max() < 6 * (rate**2 / len(keys)) ** 0.5


@given(rate=RATES)
def test_remaining_values_are_scaled_so_that_the_mean_is_unchanged(rate: float) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)  # each value that a channel can draw
    share = (every < min(max(round(rate * 2**16), 1), 2**16 - 1) - 2**15).double().mean()
    ones = dropout(torch.ones(64, 8), key=KEYS, rate=rate)
    for value in ones.unique().tolist():
        assert value in (0.0, pytest.approx(1 / (1 - float(share))))


def test_gradients_are_dropped_where_values_are() -> None:
    x = torch.ones(64, 6, requires_grad=True)
    out = dropout(x, key=KEYS, rate=0.3)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
    assert 0.1 < (out == 0).float().mean() < 0.5


def test_backward_keeps_one_byte_for_each_channel() -> None:
    kept: list[torch.Tensor] = []
    x = torch.ones(64, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(x, key=KEYS, rate=0.3)
    assert sum(t.untyped_storage().nbytes() for t in kept) == x.numel()
