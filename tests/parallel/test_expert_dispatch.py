"""Every expert dispatch gives the loss and gradients of one process."""

from functools import cache

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Tensor
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, local_tensor
from moesaic.model.transformer import Transformer
from moesaic.moe.adaptive_dispatcher import AdaptiveDispatcher
from moesaic.moe.all_to_all_dispatcher import AllToAllDispatcher, DeduplicatedAllToAllDispatcher
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.chunked_dispatcher import ChunkedAllToAllDispatcher
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.layer import moe_layers
from moesaic.moe.shared_experts import SharedExperts
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert_dispatch import (
    AdaptiveExperts,
    AllToAll,
    ChunkedAllToAll,
    ExpertDispatch,
    HierarchicalAllToAll,
)
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.sharding_plan import slice_local
from moesaic.testing.tiny_models import random_batch, tiny_model_config
from moesaic.verify.synthetic_batches import shard_batch

MODEL = tiny_model_config(
    moe=MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(),), shared_experts=SharedExperts())
)
KINDS = {
    AllToAll: AllToAllDispatcher,
    HierarchicalAllToAll: DeduplicatedAllToAllDispatcher,
    ChunkedAllToAll: ChunkedAllToAllDispatcher,
    AdaptiveExperts: AdaptiveDispatcher,
}
CASES: list[tuple[ExpertDispatch, ParallelPlan]] = [
    (AllToAll(), ParallelPlan(expert=4)),
    (HierarchicalAllToAll(ranks_per_node=2), ParallelPlan(expert=4)),
    (ChunkedAllToAll(forward=2, backward=4), ParallelPlan(expert=4)),
    (AdaptiveExperts(), ParallelPlan(expert=4)),
    (AdaptiveExperts(weight_byte_s=0), ParallelPlan(expert=2, expert_tensor=2)),
    (HierarchicalAllToAll(ranks_per_node=1), ParallelPlan(expert=2, zero=3)),
    (ChunkedAllToAll(forward=4, backward=2), ParallelPlan(expert=2, zero=3)),
    (ChunkedAllToAll(), ParallelPlan(expert=2, zero=1)),
    (AdaptiveExperts(weight_byte_s=0), ParallelPlan(expert=2, zero=3)),
]


def _build() -> Transformer:
    torch.manual_seed(0)
    return Transformer(MODEL)


def _backward(model: Transformer, *, rank: int, world: int) -> float:
    batch = random_batch(7, seed=3)
    output = model(shard_batch(batch, rank=rank, world_size=world))
    terms = [model.loss(output).total / batch.num_predicted]
    terms += [value for record in output.records for value in record.losses.values()]
    objective = torch.stack(terms).sum()
    objective.backward()
    return float(objective.detach())


@cache
def _single_process() -> tuple[float, dict[str, Tensor]]:
    model = _build()
    loss = _backward(model, rank=0, world=1)
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _losses() -> list[float]:
    """Each case's loss on this rank; gradients are compared with this rank's slices."""
    results = []
    for dispatch, plan in CASES:
        model = _build()
        parallel_model = parallelize(
            model, parallel=ParallelConfig(plan=plan, dispatch=dispatch), world=ProcessGroupWorld()
        )
        assert all(type(layer.dispatcher) is KINDS[type(dispatch)] for layer in moe_layers(model))
        parallel_model.before_backward(last=True)
        data = parallel_model.data_world
        results.append(_backward(model, rank=data.rank, world=data.size))
        parallel_model.sum_gradients()
        for name, parameter in model.named_parameters():
            part = slice_local(_single_process()[1][name], parallel_model.local_spans(name))
            assert parameter.grad is not None, (dispatch, name)
            torch.testing.assert_close(
                local_tensor(parameter.grad), part, rtol=1e-3, atol=1e-6, msg=f"{dispatch} {name}"
            )
    return results


def test_every_dispatch_gives_the_loss_and_gradients_of_one_process() -> None:
    expected, _ = _single_process()
    for losses in zip(*run_on_ranks(4, _losses), strict=True):
        assert sum(losses) == pytest.approx(expected, rel=1e-5)


def _refusals() -> list[str]:
    results = []
    low_rank = tiny_model_config(moe=MoE(experts=4, expert=LoRAExpert(rank=2)))
    for dispatch, plan, config in (
        (ChunkedAllToAll(), ParallelPlan(expert=2, expert_tensor=2), MODEL),
        (HierarchicalAllToAll(ranks_per_node=2), ParallelPlan(expert_tensor=2), MODEL),
        (HierarchicalAllToAll(ranks_per_node=3), ParallelPlan(expert=4), MODEL),
        (AdaptiveExperts(), ParallelPlan(expert=2), low_rank),
    ):
        with pytest.raises(ConfigError) as caught:
            parallelize(
                Transformer(config),
                parallel=ParallelConfig(plan=plan, dispatch=dispatch),
                world=ProcessGroupWorld(),
            )
        results.append(str(caught.value))
    return results


def test_a_dispatch_that_does_not_fit_is_refused_with_the_reason() -> None:
    for results in run_on_ranks(4, _refusals):
        assert "parallel.dispatch=ChunkedAllToAll" in results[0]
        assert "slices of GroupedExperts, and expert_tensor is 2" in results[0]
        assert "parallel.dispatch=HierarchicalAllToAll" in results[1]
        assert "are on nodes [0, 0, 0, 1], of 3 ranks each" in results[2]
        assert "weights of LoRAExperts cannot be gathered" in results[3]


def test_a_dispatch_is_set_by_a_config_string() -> None:
    run = ParallelConfig().override(["dispatch=HierarchicalAllToAll(ranks_per_node=8)"])
    assert run.dispatch == HierarchicalAllToAll(ranks_per_node=8)


def _gathered() -> list[int]:
    """Bytes gathered in a step under ZeRO 1 and 3, each with one chunk and with four."""
    results = []
    for zero in (1, 3):
        for dispatch in (AllToAll(), ChunkedAllToAll(forward=4, backward=4)):
            plan = ParallelPlan(expert=2, zero=zero)
            model = _build()
            parallel_model = parallelize(
                model,
                parallel=ParallelConfig(plan=plan, dispatch=dispatch),
                world=ProcessGroupWorld(),
            )
            parallel_model.before_backward(last=True)
            data = parallel_model.data_world
            with CommunicationCounter() as counter:
                _backward(model, rank=data.rank, world=data.size)
            results.append(counter.total_bytes(kind="all-gather"))
    return results


def test_chunks_gather_sharded_experts_once() -> None:
    for first, first_in_chunks, third, third_in_chunks in run_on_ranks(4, _gathered):
        assert (first, third) == (first_in_chunks, third_in_chunks)
        assert third > first > 0
