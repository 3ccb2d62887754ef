"""Activation checkpointing changes no loss and no gradient, and keeps fewer bytes."""

from functools import cache

import pytest
import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.moe.auxiliary_losses import GlobalBatchBalance
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import RecurrentRouting
from moesaic.moe.expert_capacity import Capacity, RandomPriority
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.moe.router_noise import Jitter
from moesaic.parallel.activation_checkpointing import (
    ActivationCheckpointing,
    CheckpointBlocks,
    CheckpointBranches,
    CheckpointCheapOperations,
    NoActivationCheckpointing,
)
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import Float32
from moesaic.testing.tiny_models import (
    BALANCED_TOP1,
    LABELS,
    random_batch,
    tiny_model_config,
)
from moesaic.train.running_metrics import LossCategories
from moesaic.train.step import Objective

MIXTURES = {
    "top1-rts-jitter": BALANCED_TOP1.replace(
        limit=Capacity(factor=0.7, minimum=0, priority=RandomPriority()), noise=Jitter(epsilon=0.2)
    ),
    "recurrent": MoE(experts=4, select=TopK(k=2), cross_layer=RecurrentRouting(width=6)),
    "over-the-step": MoE(experts=4, select=TopK(k=2), balance=(GlobalBatchBalance(weight=0.5),)),
}


MEMBERS = {
    "all": CheckpointBlocks(),
    "every-second": CheckpointBlocks(every=2),
    "attention": CheckpointBranches(branches=("mixer",)),
    "experts": CheckpointBranches(branches=("moe",)),
    "cheap": CheckpointCheapOperations(),
}


def _model(moe: MoE, by: ActivationCheckpointing, *, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny_model_config(moe=moe, layers=2).replace(dropout=dropout))
    by.apply(model)
    return model


def _step(moe: MoE, by: ActivationCheckpointing) -> tuple[dict[str, float], list[Tensor | None]]:
    # parallelize applies the checkpointing of its config
    model = _model(moe, NoActivationCheckpointing(), dropout=0.1)
    parallel = ParallelConfig(activation_checkpointing=by)
    objective = Objective(LossCategories(LABELS), precision=Float32())
    batches = [random_batch(3, seed=seed) for seed in range(3)]
    torch.manual_seed(1)  # of dropout
    seen = objective.forward_backward(
        parallelize(model, parallel=parallel, world=SingleProcess()), batches=batches
    )
    terms = {name: float(value) for name, value in seen.sums.terms.items()}
    return terms, [p.grad for p in model.parameters()]


@cache
def _step_that_keeps_all(name: str) -> tuple[dict[str, float], list[Tensor | None]]:
    return _step(MIXTURES[name], NoActivationCheckpointing())


@pytest.mark.parametrize("by", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_step_is_the_same_bit_for_bit(name: str, by: ActivationCheckpointing) -> None:
    expected, expected_grads = _step_that_keeps_all(name)
    terms, grads = _step(MIXTURES[name], by)
    assert terms == expected
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=0, rtol=0)


@pytest.mark.parametrize("by", MEMBERS.values(), ids=MEMBERS)
def test_a_backward_pass_in_two_parts_recomputes_the_same(by: ActivationCheckpointing) -> None:
    model = _model(MIXTURES["top1-rts-jitter"], by, dropout=0.1)
    total, weights = model.loss(model(random_batch(3, seed=0))).total, list(model.parameters())
    first = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(total, weights, allow_unused=True)
    for grad, same in zip(first, again, strict=True):
        torch.testing.assert_close(grad, same, atol=0, rtol=0)


def _kept(model: Transformer) -> int:
    """Bytes kept of one forward pass, by autograd or as inputs of blocks; each tensor once."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()

    def keep(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor

    for block in [*model.encoder, *model.decoder]:
        block.register_forward_pre_hook(lambda _, given: note(given[0].x))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(random_batch(16, seed=0))
        model.loss(output).total.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in found.items() if place not in weights)


def test_fewer_bytes_are_kept() -> None:
    moe = MIXTURES["top1-rts-jitter"]
    bytes_kept = [
        _kept(_model(moe, by))
        for by in (NoActivationCheckpointing(), CheckpointBlocks(every=2), CheckpointBlocks())
    ]
    assert bytes_kept == sorted(bytes_kept, reverse=True)
    assert bytes_kept[2] < bytes_kept[0] / 4
    for branch in ("mixer", "moe"):
        assert (
            bytes_kept[2]
            < _kept(_model(moe, CheckpointBranches(branches=(branch,))))
            < bytes_kept[0]
        )


def test_statistics_accumulated_between_the_passes_do_not_change_the_gradient() -> None:
    moe = MIXTURES["over-the-step"]

    def grads(by: ActivationCheckpointing, *, early: bool) -> list[Tensor | None]:
        model, losses = _model(moe, by), []
        for seed in range(2):
            output = model(random_batch(3, seed=seed))
            losses += [sum(record.losses["balance"] for record in output.records)]
            accumulate_routing_stats(model, output.records)
        if early:
            accumulate_routing_stats(model, output.records)
        sum(losses).backward()
        return [p.grad for p in model.parameters()]

    expected = grads(NoActivationCheckpointing(), early=False)
    found = grads(CheckpointBlocks(), early=True)
    assert all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )
