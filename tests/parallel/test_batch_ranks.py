"""Gathering rows over ranks, and the capacity scope: which tokens compete for expert capacity."""

import torch

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.moe.batch_group import BatchGroup
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.parallel.batch_ranks import BatchRanks, CapacityScope, DataParallelRank, GlobalBatch
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.testing.tiny_models import random_batch, tiny_model_config
from moesaic.verify.synthetic_batches import shard_batch

TIGHT = MoE(experts=4, select=SwitchTop1(), limit=Capacity(factor=0.6, minimum=1))
BATCH = random_batch(8, seed=3)


def _gather(sizes):
    world = ProcessGroupWorld()
    rows = torch.full((sizes[world.rank], 2), world.rank)
    gathered = BatchRanks(world).gather(rows)
    return gathered.rows[:, 0].tolist(), gathered.start


def test_uneven_rows_are_gathered_in_rank_order():
    results = run_on_ranks(3, _gather, [2, 0, 1])
    assert [rows for rows, _ in results] == [[0, 0, 2]] * 3
    assert [start for _, start in results] == [0, 2, 2]


def test_one_rank_gathers_nothing():
    ranks, rows = BatchRanks(SingleProcess()), torch.ones(3, 2, dtype=torch.long)
    assert isinstance(ranks, BatchGroup)
    assert ranks.gather(rows).rows is rows


def _model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny_model_config(moe=TIGHT))


def _dropped(scope: CapacityScope) -> list[int]:
    """Dropped edges by layer, of this rank's rows."""
    world, model = ProcessGroupWorld(), _model()
    plan = ParallelPlan(expert=2)
    parallelize(model, parallel=ParallelConfig(plan=plan, capacity_scope=scope), world=world)
    records = model(shard_batch(BATCH, rank=world.rank, world_size=world.size)).records
    return [int(record.routing.dropped.sum()) for record in records]


def _single_process(ranks: tuple[int, ...]) -> list[int]:
    """The same of one process with the rows of these ranks."""
    model = _model()
    parallelize(model, parallel=ParallelConfig(), world=SingleProcess())
    joined = BATCH.select(torch.cat([torch.arange(BATCH.rows)[rank::4] for rank in ranks]))
    return [int(record.routing.dropped.sum()) for record in model(joined).records]


def test_capacity_within_a_data_parallel_rank_is_that_of_one_process_with_its_rows() -> None:
    rows, batch = (
        run_on_ranks(4, _dropped, scope) for scope in (DataParallelRank(), GlobalBatch())
    )
    for ranks in ((0, 1), (2, 3)):  # ranks that share one set of experts
        found = [sum(counts) for counts in zip(*(rows[rank] for rank in ranks), strict=True)]
        assert found == _single_process(ranks)
    assert [sum(counts) for counts in zip(*batch, strict=True)] == _single_process((0, 1, 2, 3))
    assert rows != batch
