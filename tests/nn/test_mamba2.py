"""Mamba-2 equals its definition, token by token; its initial values are those of the paper."""

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Tensor
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.mamba2 import Mamba2, Mamba2Module
from moesaic.nn.packing import Packing
from moesaic.nn.sequence_mixer import MixerContext, MixerShape

DIM, LENGTHS = 8, [5, 0, 9, 1]
SHAPE = MixerShape(DIM, causal=True, attention=AttentionConfig(heads=2))
CONFIG = Mamba2(head_dim=4, state=3, groups=2)


def _module(config: Mamba2) -> Mamba2Module:
    torch.manual_seed(0)
    module = config.build(SHAPE)
    assert isinstance(module, Mamba2Module)
    return module.double()


def _definition(module: Mamba2Module, row: Tensor) -> Tensor:
    """Return the outputs of one row [S, D], one token at a time."""
    heads, groups, width = module.heads, module.groups, module.config.width
    inner, _, shared, _, _ = module.segments
    rate = -module.log_rate.exp()
    state, out = torch.zeros(heads, module.config.state, module.config.head_dim).double(), []
    inputs = torch.zeros(width, inner + 2 * shared, dtype=row.dtype)
    for x in row:
        gate, new, step = module.projection(x).split([inner, inner + 2 * shared, heads])
        inputs = torch.cat([inputs[1:], new[None]])
        mixed = (inputs * module.convolution.weight.t()).sum(0) + module.convolution.bias
        channels, key, query = F.silu(mixed).split([inner, shared, shared])
        channels, step = channels.view(heads, -1), F.softplus(step + module.step_bias)
        key, query = (
            y.view(groups, -1).repeat_interleave(heads // groups, 0) for y in (key, query)
        )
        added = step[:, None, None] * key[:, :, None] * channels[:, None]
        state = torch.exp(step * rate)[:, None, None] * state + added
        read = (query[:, None] @ state)[:, 0] + module.skip[:, None] * channels
        gated = (read.flatten() * F.silu(gate)).view(module.norm_groups, -1)
        normed = F.rms_norm(gated, (gated.shape[1],), eps=1e-5).flatten() * module.norm_weight
        out.append(module.out(normed))
    return torch.stack(out) if out else row


def test_a_module_equals_its_definition_on_every_row() -> None:
    for config in (CONFIG, CONFIG.replace(norm_groups=1), CONFIG.replace(groups=1, width=1)):
        module = _module(config)
        packing = Packing.from_lengths(torch.tensor(LENGTHS), length=9)
        x = torch.randn(sum(LENGTHS), DIM, dtype=torch.float64)
        found = module(x, context=MixerContext.of_rows(packing, causal=True))
        expected = torch.cat([_definition(module, row) for row in x.split(LENGTHS)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_initial_steps_and_decay_rates_are_in_their_ranges() -> None:
    module = _module(Mamba2(head_dim=1, expand=64.0, state=1, min_step=0.01, max_step=0.2))
    step, rate = F.softplus(module.step_bias.detach()), module.log_rate.detach().exp()
    assert 0.01 <= float(step.min()) < 0.02
    assert 0.1 < float(step.max()) <= 0.2001
    assert 1 <= float(rate.min()) < 2
    assert 14 < float(rate.max()) <= 16


def test_it_names_what_does_not_fit() -> None:
    both = MixerShape(DIM, causal=False, attention=AttentionConfig(heads=2))
    assert "a decoder" in str(CONFIG.problems(both))
    assert "head_dim=5" in str(CONFIG.replace(head_dim=5).problems(SHAPE))
    assert "groups=3" in str(CONFIG.replace(groups=3).problems(SHAPE))
    assert CONFIG.problems(SHAPE) is None
