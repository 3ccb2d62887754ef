"""Decode states of recurrences: constant in length, the same whatever the steps and the padding.

That context ranks compute the same is a law (``test_context_parallel_ranks_share_one_loss``).
"""

import pytest
import torch

from moesaic.core.shapes import Tensor
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.gated_linear_attention import GatedLinearAttention
from moesaic.nn.mamba2 import Mamba2
from moesaic.nn.packing import Packing
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule

DIM, ROWS, LENGTH = 8, 3, 11
SHAPE = MixerShape(DIM, causal=True, attention=AttentionConfig(heads=2))
MIXERS = {
    "gated linear attention": GatedLinearAttention(heads=2, gate_rank=4),
    "Mamba-2": Mamba2(head_dim=4, state=3, groups=2),
}


def _module(mixer: SequenceMixer) -> SequenceMixerModule:
    torch.manual_seed(0)
    return mixer.build(SHAPE).double()


def _step(
    module: SequenceMixerModule, x: Tensor, *, counts: list[int], state: DecodeState
) -> list[Tensor]:
    """Return each row's outputs for its newest tokens, the first ``counts`` of x [B, n, D]."""
    packing = Packing.from_lengths(torch.tensor(counts), length=x.shape[1])
    context = MixerContext.of_rows(packing, causal=True)
    out = module(packing.pack(x), context=context, state=state)
    return list(out.split(counts))


@pytest.mark.parametrize("name", MIXERS)
def test_steps_of_any_size_equal_whole_rows(name: str) -> None:
    module = _module(MIXERS[name])
    x = torch.randn(ROWS, LENGTH, DIM, dtype=torch.float64)
    whole = Packing.from_lengths(torch.full((ROWS,), LENGTH), length=LENGTH)
    context = MixerContext.of_rows(whole, causal=True)
    expected = module(x.flatten(0, 1), context=context).view(x.shape)
    state, done = module.init_state(ROWS, like=x), [0] * ROWS
    found: list[list[Tensor]] = [[] for _ in range(ROWS)]
    nbytes = {state.nbytes}
    for counts in ([5, 1, 0], [1, 1, 1], [5, 9, 1], [0, 0, 9]):
        newest = torch.full((ROWS, max(counts), DIM), 1e3, dtype=torch.float64)
        for row, count in enumerate(counts):
            newest[row, :count] = x[row, done[row] : done[row] + count]
            done[row] += count
        for row, out in enumerate(_step(module, newest, counts=counts, state=state)):
            found[row].append(out)
        nbytes.add(state.nbytes)
    assert len(nbytes) == 1, "the state is constant in length"
    for row in range(ROWS):
        torch.testing.assert_close(torch.cat(found[row]), expected[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_a_selected_state_goes_on_as_its_row(name: str) -> None:
    module = _module(MIXERS[name])
    x = torch.randn(ROWS, 6, DIM, dtype=torch.float64)
    state = module.init_state(ROWS, like=x)
    _step(module, x[:, :5], counts=[5] * ROWS, state=state)
    swapped = state.select(torch.tensor([2, 0, 2]), None)
    here = _step(module, x[:, 5:], counts=[1] * ROWS, state=state)
    there = _step(module, x[[2, 0, 2], 5:], counts=[1] * ROWS, state=swapped)
    torch.testing.assert_close(torch.stack(there), torch.stack([here[2], here[0], here[2]]))
