"""Gated linear attention equals its definition, token by token and row by row."""

import pytest
import torch
import torch.nn.functional as F

from moesaic.core.shapes import Tensor
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.gated_linear_attention import GatedLinearAttention, GatedLinearAttentionModule
from moesaic.nn.norm import LayerNorm, RMSNorm
from moesaic.nn.packing import Packing
from moesaic.nn.sequence_mixer import MixerContext, MixerShape

DIM, LENGTHS = 12, [5, 0, 9, 1]
SHAPE = MixerShape(DIM, causal=True, attention=AttentionConfig(heads=2))


def _module(config: GatedLinearAttention) -> GatedLinearAttentionModule:
    torch.manual_seed(0)
    module = config.build(SHAPE)
    assert isinstance(module, GatedLinearAttentionModule)
    return module.double()


def _definition(module: GatedLinearAttentionModule, row: Tensor) -> Tensor:
    """Return the outputs of one row [S, D]: equations 3 and 4, section 4.4 of the paper."""
    heads, keys = module.heads, module.key_dim
    state, out = torch.zeros(heads, keys, module.value_dim, dtype=row.dtype), []
    for x in row:
        widths = [heads * keys, heads * keys, x.numel(), x.numel()]
        query, key, value, gate = (part.view(heads, -1) for part in module.qkvr(x).split(widths))
        decay = module.gate_up(module.gate_down(x)).sigmoid() ** (1 / module.temperature)
        state = decay.view(heads, keys, 1) * state + key[:, :, None] * value[:, None]
        read = (query[:, None] @ state)[:, 0] * keys**-0.5
        out.append(module.out((module.norm(read) * F.silu(gate)).flatten()))
    return torch.stack(out) if out else row


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()])
def test_a_module_equals_its_definition_on_every_row(norm: RMSNorm | LayerNorm) -> None:
    module = _module(GatedLinearAttention(heads=3, gate_rank=4, norm=norm))
    packing = Packing.from_lengths(torch.tensor(LENGTHS), length=9)
    x = torch.randn(sum(LENGTHS), DIM, dtype=torch.float64)
    found = module(x, context=MixerContext.of_rows(packing, causal=True))
    expected = torch.cat([_definition(module, row) for row in x.split(LENGTHS)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_it_is_refused_in_an_encoder() -> None:
    both = MixerShape(DIM, causal=False, attention=AttentionConfig(heads=2))
    assert "a decoder" in str(GatedLinearAttention().problems(both))
    assert "key_dim" in str(GatedLinearAttention(heads=4).problems(SHAPE))
    assert GatedLinearAttention(heads=3).problems(SHAPE) is None
