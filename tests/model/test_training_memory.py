"""Estimated bytes agree with allocated ones (see also the law)."""

import pytest
import torch

from model.samples import BASE, VARIANTS
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.training_memory import (
    activation_bytes,
    estimate_training_memory,
    optimizer_bytes,
)
from moesaic.model.transformer import Transformer
from moesaic.optim.optimizer import AdamW, Muon


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", ["rotary-top2", "switch-layernorm-sinusoidal-bias"])
def test_estimated_optimizer_state_is_exact(name, optimizer):
    config = VARIANTS[name]
    model = Transformer(config)
    built = optimizer.build(model.named_parameters(), kinds=model.parameter_kinds())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    held = [t for s in built.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    real = sum(t.numel() * t.element_size() for t in held)
    # entries are per shape and layer, so even the scalar step counters agree
    assert optimizer_bytes(config, optimizer=optimizer) == real


def test_the_parts_add_up():
    found = estimate_training_memory(BASE, sizes=BatchDims(rows=2))
    parts = found.weights + found.gradients + found.optimizer + found.activations
    assert found.total == parts
    assert found.weights == found.gradients


def test_activations_grow_with_the_batch():
    one, two = (activation_bytes(BASE, sizes=BatchDims(rows=n)) for n in (1, 2))
    table = 4 * BASE.vocab_size * BASE.dim  # the gradient of the output table
    assert two - table == 2 * (one - table)
