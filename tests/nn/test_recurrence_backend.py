"""The decode state of a recurrence has one size, whatever the number of tokens.

That steps equal whole rows and that context ranks equal one process are laws.
"""

import pytest
import torch

from mixer_cases import MIXERS
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.packing import Packing
from moesaic.nn.sequence_mixer import MixerContext, MixerShape

SHAPE = MixerShape(16, causal=True, attention=AttentionConfig(heads=4))


@pytest.mark.parametrize("name", ["gated_linear_attention", "mamba2"])
def test_the_state_is_constant_in_length(name: str) -> None:
    torch.manual_seed(0)
    module, sizes = MIXERS[name].build(SHAPE), set()
    state = module.init_state(2, like=torch.zeros(1))
    for count in (1, 5, 90):
        sizes.add(state.nbytes)
        packing = Packing.from_lengths(torch.tensor([count, 1]), length=count)
        context = MixerContext.of_rows(packing, causal=True)
        module(torch.randn(count + 1, SHAPE.dim), context=context, state=state)
    sizes.add(state.nbytes)
    assert len(sizes) == 1
