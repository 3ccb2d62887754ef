"""Optimizer state is exported and restored by parameter name."""

import pytest
import torch
from torch import nn

from moesaic.core.errors import CheckpointError
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.optim.optimizer_state import frozen_state, masters_of, restore_state, without_masters


def export_state(optimizer):
    return without_masters(frozen_state(optimizer))


KINDS = {"w": "matrix", "bank": "expert", "norm": "norm", "unused": "matrix"}
CONFIGS = [AdamW(lr=0.01), Muon(lr=0.01)]


def build(config, dtype=torch.float32, order=("w", "bank", "norm", "unused")):
    make = torch.Generator().manual_seed(0)
    shapes = {"w": (6, 4), "bank": (3, 4, 6), "norm": (4,), "unused": (2, 2)}
    params = {n: nn.Parameter(torch.randn(s, generator=make).to(dtype)) for n, s in shapes.items()}
    return params, config.build([(n, params[n]) for n in order], kinds=KINDS)


def steps(params, optimizer, *, first, last):
    for step in range(first, last):
        make = torch.Generator().manual_seed(step)
        for name in ("w", "bank", "norm"):
            params[name].grad = torch.randn(params[name].shape, generator=make).to(
                params[name].dtype
            )
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS, ids=["adamw", "muon"])
def test_restoring_continues_bit_for_bit_whatever_the_order_of_parameters(config, dtype):
    params, optimizer = build(config, dtype)
    steps(params, optimizer, first=0, last=5)
    saved = {k: t.clone() for k, t in export_state(optimizer).items()}
    weights = {n: p.detach().clone() for n, p in params.items()}
    weights |= {n: master.clone() for n, master in masters_of(frozen_state(optimizer)).items()}
    steps(params, optimizer, first=5, last=9)

    again, resumed = build(config, dtype, order=("unused", "norm", "bank", "w"))
    for name, p in again.items():
        p.data.copy_(weights[name])
    restore_state(resumed, saved, weights=weights)
    steps(again, resumed, first=5, last=9)
    assert all(torch.equal(params[n], again[n]) for n in params)
    mine, theirs = export_state(optimizer), export_state(resumed)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_restored_tensors_are_copies():
    params, optimizer = build(CONFIGS[0])
    steps(params, optimizer, first=0, last=1)
    saved = {k: t.clone() for k, t in export_state(optimizer).items()}
    before = {k: t.clone() for k, t in saved.items()}
    restore_state(optimizer, saved, weights={})
    steps(params, optimizer, first=1, last=2)
    assert all(torch.equal(saved[k], before[k]) for k in saved)


def test_an_empty_state_restores_to_a_fresh_optimizer():
    params, optimizer = build(CONFIGS[0])
    steps(params, optimizer, first=0, last=1)
    restore_state(optimizer, {}, weights={})
    assert export_state(optimizer) == {}


def drop(saved):
    del saved["exp_avg/w"]
    return "missing: exp_avg/w"


def add(saved):
    saved["exp_avg/elsewhere"] = torch.ones(2)
    return "unknown: exp_avg/elsewhere"


def reshape(saved):
    saved["exp_avg/w"] = torch.ones(2)
    return r"another shape: exp_avg/w \[2\] instead of \[6, 4\]"


@pytest.mark.parametrize("damage", [drop, add, reshape])
def test_state_that_does_not_fit_is_named_and_changes_nothing(damage):
    params, optimizer = build(CONFIGS[0])
    steps(params, optimizer, first=0, last=2)
    saved = dict(export_state(optimizer))
    before = {k: t.clone() for k, t in saved.items()}
    message = damage(saved)
    with pytest.raises(CheckpointError, match=message):
        restore_state(optimizer, saved, weights={})
    now = export_state(optimizer)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[k], before[k]) for k in now)


def test_state_of_another_rule_is_refused():
    params, optimizer = build(Muon())
    steps(params, optimizer, first=0, last=1)
    _, other = build(AdamW())
    with pytest.raises(CheckpointError, match="momentum"):
        restore_state(other, export_state(optimizer), weights={})
