"""Law: however many ranks share a batch, the loss, its parts and its gradients are the same."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pytest
import torch

from head_cases import HEADS, head_batch
from head_cases import LABELS as HEAD_LABELS
from moe.variants import BALANCES, balanced
from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks, run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.model.transformer import Transformer
from moesaic.moe.adaptive_auxiliary_losses import NullBalance
from moesaic.moe.auxiliary_losses import (
    MutualInformationBalance,
    SequenceBalance,
    TargetLoadBalance,
)
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.cross_layer_router import DecoupledRouting, RecurrentRouting
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import (
    BatchPriority,
    Capacity,
    PositionPriority,
    Priority,
    RandomPriority,
    RowCapacity,
    WeightPriority,
)
from moesaic.moe.expert_selection import Hash, NullTopK, SigmoidTopK, Top2, TopGroups, TopK
from moesaic.moe.expert_selection_dynamic import DenseAll, ExpertChoice, Threshold, TopP
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.layer import update_stateful_rules
from moesaic.moe.null_experts import IdentityExperts, ZeroExperts
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.moe.router_gate import HiddenStateAndTag
from moesaic.moe.router_noise import Jitter, StochasticWarmup
from moesaic.moe.shared_experts import GatedSharedExperts, ResidualExpert
from moesaic.moe.soft_moe import SoftMoE
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import Float32
from moesaic.testing.tiny_models import (
    BALANCED_TOP1,
    LABELS,
    random_batch,
    tiny_model_config,
)
from moesaic.train.running_metrics import LossCategories, RunningMetrics
from moesaic.train.step import Objective
from moesaic.verify.synthetic_batches import shard_batch


def _capped(priority: Priority) -> MoE:
    return BALANCED_TOP1.replace(limit=Capacity(factor=0.7, minimum=0, priority=priority))


VARIANTS = {
    "dense": NoMoE(),
    "top1-balance-z": BALANCED_TOP1,
    "top2": MoE(experts=4, select=TopK(k=2)),
    "by-position": _capped(PositionPriority()),
    "by-weight": _capped(WeightPriority()),
    "by-token": _capped(BatchPriority()),
    "random-token-selection": _capped(RandomPriority()),
    "by-row": BALANCED_TOP1.replace(limit=RowCapacity(number=2)),
    "jitter": BALANCED_TOP1.replace(noise=Jitter(epsilon=0.2)),
    "sampled-second": MoE(experts=4, select=Top2(second="sampled")),
    "sigmoid": MoE(experts=4, select=SigmoidTopK(k=2)),
    "deepseek-v3": MoE(
        experts=4,
        select=SigmoidTopK(k=2, expert_groups=TopGroups(num_groups=2, top_groups=1)),
        balance=(BiasUpdate(rate=0.05), SequenceBalance(weight=0.1)),
    ),
    "top-p": MoE(experts=4, select=TopP()),
    "null": MoE(
        experts=4,
        select=NullTopK(),
        null_experts=ZeroExperts(number=2),
        balance=(NullBalance(weight=0.5, decay_steps=2),),
    ),
    "hash": MoE(experts=4, select=Hash(), balance=()),
    "dense-all": MoE(experts=4, select=DenseAll(), balance=(MutualInformationBalance(weight=0.5),)),
    "mixture-of-depths": MoE(
        experts=1, select=Threshold(), balance=(TargetLoadBalance(target=0.3),)
    ),
    "expert-choice": MoE(experts=4, select=ExpertChoice(), balance=()),
    "warm-up": BALANCED_TOP1.replace(noise=StochasticWarmup(warmup_steps=3)),
    **{name: balanced(name) for name in BALANCES if name != "micro-batch"},  # its ranks differ
    "all-bodies": MoE(
        experts=4,
        select=TopK(k=2),
        expert=LoRAExpert(rank=2),
        shared_experts=GatedSharedExperts(),
        dispatch_projection=DownProjection(ratio=0.5),
        null_experts=IdentityExperts(),
    ),
    "residual": BALANCED_TOP1.replace(shared_experts=ResidualExpert()),
    "soft": SoftMoE(experts=3, slots=2),
    "memory": ProductKeyMemory(keys_per_side=4, slots=3),
    "recurrent": MoE(experts=4, select=TopK(k=2), cross_layer=RecurrentRouting(width=6)),
    "decoupled": MoE(experts=4, select=TopK(k=2), cross_layer=DecoupledRouting(dim=8, heads=2)),
    "on-tag": MoE(experts=4, select=TopK(k=2), router_input=HiddenStateAndTag()),
}
STEPS = 2  # the second after an update of weights and of stateful rules
Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def _train(world: World, moe: SparseLayer, rows: int) -> Outcome:
    torch.manual_seed(0)
    model = Transformer(tiny_model_config(moe=moe))
    parallel_model = parallelize(model, parallel=ParallelConfig(), world=world)
    categories = LossCategories(LABELS)
    objective = Objective(categories, precision=Float32())
    optimizer = AdamW(eps=1e-5).build(model.named_parameters(), kinds=model.parameter_kinds())
    history = []
    for step in range(STEPS):
        batches = [random_batch(rows, seed=10 * step + micro) for micro in range(2)]
        local = [shard_batch(batch, rank=world.rank, world_size=world.size) for batch in batches]
        result = objective.forward_backward(parallel_model, batches=local)
        metrics = RunningMetrics(categories, device=world.device)
        metrics.add_step(result.sums, norm=0.0)
        history.append(metrics.compute_and_reset(world))
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        update_stateful_rules(model)
    return history, grads


def _train_head(world: World, name: str) -> Outcome:
    """Two micro-batches of a head; pairs of rows stay on one rank."""
    torch.manual_seed(0)
    model = Transformer(HEADS[name])
    parallel_model = parallelize(model, parallel=ParallelConfig(), world=world)
    categories = LossCategories(HEAD_LABELS)
    objective = Objective(categories, precision=Float32())
    rows = torch.arange(16)
    own = rows[rows // 2 % world.size == world.rank]
    batches = [head_batch(name, rows=16, seed=micro).select(own) for micro in range(2)]
    result = objective.forward_backward(parallel_model, batches=batches)
    values = ("loss", *HEADS[name].head.metric_names)
    metrics = RunningMetrics(categories, device=world.device, values=values)
    metrics.add_step(result.sums, norm=0.0)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [metrics.compute_and_reset(world)], grads


def _outcomes(size: int, run: Callable[[str], Outcome], names: Sequence[str]) -> Iterator[Outcome]:
    """Yield the outcome of each rank for each name in turn; the ranks are forked once."""
    for name, ranks in zip(names, run_cases_on_ranks(size, run, names), strict=True):
        assert not isinstance(ranks, RankError), f"{name}: {ranks}"
        yield from ranks


def _head_on_rank(name: str) -> Outcome:
    return _train_head(ProcessGroupWorld(), name)


def test_data_parallel_ranks_give_the_same_loss_of_every_head() -> None:
    outcomes = _outcomes(2, _head_on_rank, list(HEADS))
    for name in HEADS:
        (expected,), grads = _train_head(SingleProcess(), name)
        assert any(key.startswith("train/loss/class/") for key in expected)
        for (row,), rank_grads in islice(outcomes, 2):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-8), name
            for parameter, grad in grads.items():
                message = f"{name}: {parameter}"
                torch.testing.assert_close(
                    rank_grads[parameter], grad, rtol=1e-4, atol=1e-6, msg=message
                )


def _on_rank(variant: str, rows: int = 8) -> Outcome:
    return _train(ProcessGroupWorld(), VARIANTS[variant], rows)


# sums over ranks are of any number: two ranks for every rule, four for those whose order matters
CASES = {
    1: ["top1-balance-z"],
    2: list(VARIANTS),
    4: ["by-weight", "random-token-selection", "deepseek-v3", "adaptive", "recurrent"],
}


@pytest.mark.parametrize("size", CASES)
def test_data_parallel_ranks_give_the_same_loss(size: int) -> None:
    outcomes = _outcomes(size, _on_rank, CASES[size])
    for variant in CASES[size]:
        losses, grads = _train(SingleProcess(), VARIANTS[variant], 8)
        for history, rank_grads in islice(outcomes, size):
            for expected, row in zip(losses, history, strict=True):
                assert row == pytest.approx(expected, rel=1e-6, abs=1e-9), variant
            for name, grad in grads.items():
                message = f"{variant}: {name}"
                torch.testing.assert_close(
                    rank_grads[name], grad, rtol=2e-4, atol=1e-6, msg=message
                )


def test_a_rank_without_rows_gives_the_same_loss() -> None:
    losses, _ = _train(SingleProcess(), BALANCED_TOP1, 3)
    for history, _ in run_on_ranks(4, _on_rank, "top1-balance-z", 3):
        assert history[-1] == pytest.approx(losses[-1], rel=1e-6, abs=1e-9)
