"""The capacity scope: which tokens compete for expert capacity."""

from dataclasses import replace
from functools import partial

import torch

from moesaic.distributed.forked_ranks import run_cases_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.edge_queues import QueuedEdges, keep_first, keep_first_over_ranks
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.parallel.batch_ranks import (
    CapacityScope,
    DataParallelRank,
    EachRow,
    GlobalBatch,
    LocalGroup,
)
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.testing.tiny_models import random_batch, tiny_model_config
from moesaic.verify.synthetic_batches import shard_batch

TIGHT = MoE(experts=4, select=SwitchTop1(), limit=Capacity(factor=0.6, minimum=1))
BATCH = random_batch(8, seed=3)


ORDERS = {"random": (64,), "by position": (16, 64, 32), "by weight": (32, 16, 64, 32)}


def _queued(rank: int, bits: tuple[int, ...], *, spread: int) -> QueuedEdges:
    """Edges of a rank, of which some have equal keys and many an equal start of the key."""
    make = torch.Generator().manual_seed(rank)
    number = (40, 0, 25)[rank]
    key = torch.randint(spread, (number, len(bits)), generator=make)
    high = torch.tensor([63 if width == 64 else width - 1 for width in bits])
    key = key << (high - 3) if spread == 8 else key
    key = torch.where(torch.tensor(bits) == 64, key - spread // 2, key)
    expert = torch.randint(4, (number,), generator=make).clamp(max=3)
    return QueuedEdges(expert, key, bits, row=expert, num_experts=4, num_limited=3)


def _compare_kept(case: tuple[tuple[int, ...], int]) -> bool:
    bits, spread = case
    world = ProcessGroupWorld()
    edges = _queued(world.rank, bits, spread=spread)
    every = [_queued(rank, bits, spread=spread) for rank in range(world.size)]
    gathered = replace(
        edges,
        expert=torch.cat([each.expert for each in every]),
        key=torch.cat([each.key for each in every]),
    )
    same = True
    for factor in (0.3, 0.7, 1.0, 9.0):
        capacity = partial(Capacity().expert_capacity, num_experts=4, factor=factor)
        expected = keep_first(gathered, capacity=capacity)
        first = sum(len(each.expert) for each in every[: world.rank])
        found = keep_first_over_ranks(edges, capacity=capacity, world=world)
        same &= torch.equal(found, expected[first : first + len(found)])
    return same


def test_counts_over_ranks_keep_the_edges_that_sorting_all_of_them_keeps() -> None:
    cases = [(bits, spread) for bits in ORDERS.values() for spread in (2, 8, 1000)]
    assert list(run_cases_on_ranks(3, _compare_kept, cases)) == [[True] * 3] * len(cases)


def _model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny_model_config(moe=TIGHT))


def _dropped(case: tuple[ParallelPlan, CapacityScope]) -> list[int]:
    """Dropped edges by layer, of this rank's tokens."""
    plan, scope = case
    world, model = ProcessGroupWorld(), _model()
    parallel = parallelize(
        model, parallel=ParallelConfig(plan=plan, capacity_scope=scope), world=world
    )
    data = parallel.data_world
    records = model(shard_batch(BATCH, rank=data.rank, world_size=data.size)).records
    return [int(record.routing.dropped.sum()) for record in records]


def _single_process(data_ranks: list[int], *, size: int, scope: CapacityScope) -> list[int]:
    """The same of one process with the rows of these data ranks."""
    model = _model()
    parallelize(model, parallel=ParallelConfig(capacity_scope=scope), world=SingleProcess())
    rows = torch.cat([torch.arange(BATCH.rows)[rank::size] for rank in data_ranks])
    return [int(record.routing.dropped.sum()) for record in model(BATCH.select(rows)).records]


# ranks that share a scope, by plan; a row is in one rank or in those of its data rank
E2, T2, C2 = ParallelPlan(expert=2), ParallelPlan(tensor=2), ParallelPlan(context=2)
ET2 = ParallelPlan(expert_tensor=2)
CASES = {
    "whole batch": (E2, GlobalBatch(), [[0, 1, 2, 3]]),
    "ranks that share experts": (E2, DataParallelRank(), [[0, 1], [2, 3]]),
    "ranks that share the slices of experts": (ET2, DataParallelRank(), [[0, 1], [2, 3]]),
    "data rank": (E2, LocalGroup(), [[0], [1], [2], [3]]),
    "data rank with tensor ranks": (T2, LocalGroup(), [[0], [1]]),
    "data rank with context ranks": (C2, LocalGroup(), [[0], [1]]),
    "row": (E2, EachRow(), [[0, 1, 2, 3]]),
    "row with tensor ranks": (T2, EachRow(), [[0, 1]]),
    "row with context ranks": (C2, EachRow(), [[0, 1]]),
}


def test_capacity_in_a_scope_is_that_of_one_process_with_its_tokens() -> None:
    cases = [(plan, scope) for plan, scope, _ in CASES.values()]
    found = run_cases_on_ranks(4, _dropped, cases)
    totals = []
    for ranks, (plan, scope, groups) in zip(found, CASES.values(), strict=True):
        assert isinstance(ranks, list)
        size = 4 // (plan.tensor * plan.context)
        expected = [_single_process(group, size=size, scope=scope) for group in groups]
        totals.append([sum(counts) for counts in zip(*ranks, strict=True)])
        assert totals[-1] == [sum(counts) for counts in zip(*expected, strict=True)], scope
    assert totals[0] != totals[3] != totals[6]  # the scope decides
