"""Counted work of one rank: a whole training step, its start, its tiers, its checkpoint.

The other ranks are those of a fake process group: their numbers are this rank's.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from cost_counters import AllocationMeter, CostLaw, OperationCounter, open_files, peak_bytes
from moesaic.checkpoint import manifest, sharded_checkpoint, tensor_reader
from moesaic.checkpoint.full_checkpoint import save_checkpoint
from moesaic.checkpoint.reshard import ShardedForm, reshard
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.stored_weights import open_weights
from moesaic.checkpoint.tensor_reader import TensorReader
from moesaic.data.batch import SOURCE_LANGUAGE, TARGET_LANGUAGE, TASK, Batch
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.simulation import fake_process_group
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import DiskStorage
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn import initializer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.weight_start import draw_shards, weight_shards
from moesaic.testing.tiny_models import TASKS, TinyStream, tiny_model_config, tiny_run
from moesaic.train.run_training import seeded_trainer
from moesaic.train.trainer import Trainer


class SameBatch(TinyStream):
    """Every batch has the same rows, and every rank has the rows of one of two."""

    def __init__(self, languages: int) -> None:
        super().__init__(world_size=2)
        names = tuple(f"x{number}" for number in range(languages))
        self.labels = {TASK: TASKS, SOURCE_LANGUAGE: names, TARGET_LANGUAGE: names}

    def full_batch(self, number: int) -> Batch:
        return super().full_batch(0 * number)


@dataclass(frozen=True, slots=True)
class StepSize:
    """What grows; a rank has two experts per token in each of two layers."""

    ranks: int = 2
    experts: int = 4
    micro_batches: int = 1
    words: int = 64
    languages: int = 3
    plan: ParallelPlan = ParallelPlan()  # noqa: RUF009 - frozen
    memory: MemoryPlan = MemoryPlan()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step does."""

    operations: int
    flops: int
    held_bytes: int
    sent_bytes: int
    messages: int
    tier_bytes: int
    files: int


def _trainer(size: StepSize) -> Trainer:
    moe = MoE(experts=size.experts, select=TopK(k=2), balance=(SwitchBalance(), RouterZLoss()))
    run = tiny_run(
        model=tiny_model_config(moe=moe).replace(vocab_size=size.words),
        parallel=ParallelConfig(plan=size.plan, memory=size.memory),
        gradient_accumulation_steps=size.micro_batches,
        clip_norm=0.1,
    )
    stream = SameBatch(size.languages)
    return seeded_trainer(run, make_loader=lambda _: stream, world=ProcessGroupWorld())


@cache
def step_work(size: StepSize) -> StepWork:
    """Count the second step of a run: the first one makes states and selects kernels."""
    gc.collect()  # a trainer that is gone closes its files
    opened = open_files()
    with fake_process_group(size.ranks):
        trainer = _trainer(size)
        trainer.train_step()
        tier = trainer.optimizer.tier
        before = tier.store.moved.fetched + tier.store.moved.written if tier else 0
        with AllocationMeter() as held, OperationCounter() as done, CommunicationCounter() as sent:
            trainer.train_step()
        after = tier.store.moved.fetched + tier.store.moved.written if tier else 0
        return StepWork(
            done.total,
            done.flops,
            held.ledger.peak_bytes,
            sent.total_bytes(),
            sent.calls().total(),
            after - before,
            open_files() - opened,
        )


WEIGHTS = 66496  # bytes of a model of 4 experts and 64 words: all weights,
EXPERT, WORD = 12416, 64  # those of one more expert in each of two layers, and of one more word
COUNTERS = 2 * 136  # bytes of the loads of both layers, summed once in a micro-batch
PREDICTIONS = 30  # whose logits are one chunk
ZERO, ON_DISK = ParallelPlan(zero=3), MemoryPlan(optimizer_states=DiskStorage())
ONE = StepSize()


def step_laws() -> dict[str, CostLaw]:
    """What the steps of two ranks (or n) cost beside that of ``ONE``."""

    def row(work: str, field: str, formula: Callable[[int], float], **fixed: Any) -> CostLaw:
        size = max(2, getattr(ONE, field))

        def count(n: int) -> float:
            return getattr(step_work(replace(ONE, **fixed, **{field: n})), work)

        return CostLaw(count, formula, size=size)

    def as_one(work: str, times: int = 0) -> Callable[[int], float]:
        return lambda n: getattr(step_work(ONE), work) * (n if times else 1)

    same = {
        f"{work} of a step at n {field}": row(work, field, as_one(work))
        for work in ("operations", "messages")
        for field in ("ranks", "experts", "words", "languages")
    }
    return same | {
        "operations of a step of n micro-batches": row(
            "operations", "micro_batches", as_one("operations", times=1)
        ),
        "messages of a step of n micro-batches": row(
            "messages", "micro_batches", lambda n: 2 + 2 * n
        ),
        "FLOPs of a step of n micro-batches": row("flops", "micro_batches", as_one("flops", 1)),
        "FLOPs of a step at n ranks": row("flops", "ranks", as_one("flops")),
        "FLOPs of a step at n languages": row("flops", "languages", as_one("flops")),
        "FLOPs of a step at n experts": row(  # the router's
            "flops", "experts", lambda n: step_work(ONE).flops + 4512 * (n - 4)
        ),
        "FLOPs of a step at n words": row(  # of the predictions' logits, and of their gradients
            "flops", "words", lambda n: step_work(ONE).flops + 1472 * (n - 64)
        ),
        **{
            f"files that a step opens at n {field}": row("files", field, lambda _: 0)
            for field in ("ranks", "experts", "micro_batches", "words", "languages")
        },
        **{
            f"files that a step with states on disk opens at n {field}": row(
                "files", field, lambda _: 1, plan=ZERO, memory=ON_DISK
            )
            for field in ("ranks", "experts", "words")
        },
        "bytes sent in a step at n ranks": row(
            "sent_bytes", "ranks", lambda n: 2 * (n - 1) / n * (WEIGHTS + COUNTERS)
        ),
        "bytes sent in a step at n ranks with ZeRO": row(
            "sent_bytes", "ranks", lambda n: 3 * (n - 1) / n * WEIGHTS, plan=ZERO
        ),
        "bytes sent in a step at n experts": row(
            "sent_bytes", "experts", lambda n: WEIGHTS + EXPERT * (n - 4)
        ),
        "bytes sent in a step of n micro-batches": row(
            "sent_bytes", "micro_batches", lambda n: WEIGHTS + COUNTERS * n
        ),
        "bytes sent in a step at n words": row(
            "sent_bytes", "words", lambda n: WEIGHTS + WORD * (n - 64)
        ),
        "bytes sent in a step at n languages": row("sent_bytes", "languages", lambda _: WEIGHTS),
        "bytes held in a step at n ranks": row("held_bytes", "ranks", as_one("held_bytes")),
        "bytes held in a step at n languages": row("held_bytes", "languages", as_one("held_bytes")),
        "bytes held in a step of n micro-batches": row(
            "held_bytes",
            "micro_batches",
            lambda _: step_work(replace(ONE, micro_batches=2)).held_bytes,
        ),
        # gradients twice, to be summed as one
        "bytes held in a step at n experts": row(
            "held_bytes", "experts", lambda n: 2 * (WEIGHTS + EXPERT * (n - 4)) + 12_000
        ),
        "bytes held in a step at n words": row(
            "held_bytes",
            "words",
            lambda n: 2 * (WEIGHTS + WORD * (n - 64)) + 4 * PREDICTIONS * n,
        ),
        # two states, read and written; other tiers: test_tiered_training_equals_resident_training
        "bytes between tiers in a step at n ranks": row(
            "tier_bytes", "ranks", lambda n: 4 * WEIGHTS / n, plan=ZERO, memory=ON_DISK
        ),
    }


CONFIG, VALUES_AT_ONCE, OPEN_AT_ONCE = tiny_model_config(), 128, 3


@contextmanager
def _empty_part(ranks: int) -> Iterator[ParallelModel]:
    """A rank's part of a model that ZeRO 3 shards over so many ranks."""
    with fake_process_group(ranks):
        model = Transformer.without_values(CONFIG)
        mesh = Mesh(
            ParallelPlan(zero=3).resolve(ranks),
            rank=0,
            device=torch.device("cpu"),
            expert_counts=expert_counts(model),
        )
        yield parallelize_on_mesh(
            model, parallel=ParallelConfig(plan=ParallelPlan(zero=3)), mesh=mesh
        )


def start_bytes(ranks: int) -> int:
    """The bytes that a rank of so many holds at once while its weights are drawn."""

    def start() -> None:
        with _empty_part(ranks) as part:
            draw_shards(part, seed=0)

    with patch.object(initializer, "VALUES_AT_ONCE", VALUES_AT_ONCE):
        return peak_bytes(start)


@contextmanager
def _checkpoint(*, written_by: int = 1) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        files = {"model": export_weights(Transformer(CONFIG))}
        path = save_checkpoint(Path(folder) / "whole", Snapshot(1, files, {}, {}, {}))
        if written_by > 1:
            path = reshard(path, root=Path(folder), form=ShardedForm(written_by))
        yield path


def read_bytes(ranks: int, *, written_by: int = 1) -> int:
    """The bytes of a checkpoint of some ranks that a rank of so many reads into its shards."""
    read: Counter[str] = Counter()
    whole = TensorReader.read_slice

    def counting(reader, stored, *, block, start, shape):
        read["bytes"] += torch.Size(shape).numel() * stored.dtype.itemsize
        return whole(reader, stored, block=block, start=start, shape=shape)

    with _checkpoint(written_by=written_by) as path, _empty_part(ranks) as part:
        into = {"model": weight_shards(part)}
        with patch.object(TensorReader, "read_slice", counting):
            sharded_checkpoint.load_verified(path, into=into, world=SingleProcess())
    return read["bytes"]


def files_read_at_once(written_by: int) -> int:
    """The files that are open at most while the weights of so many ranks are read."""
    opened: list[int] = []
    whole = TensorReader._file

    def counting(reader: TensorReader, name: str) -> Any:
        file = whole(reader, name)
        opened.append(len(reader._opened))
        return file

    with (
        _checkpoint(written_by=written_by) as path,
        patch.object(TensorReader, "_file", counting),
        patch.object(tensor_reader, "MAX_OPEN_FILES", OPEN_AT_ONCE),
        open_weights(path) as stored,
    ):
        for name in stored.tensors:
            stored.whole(name)
    return max(opened)


def files_hashed(ranks: int) -> int:
    """The files that so many ranks hash together before a checkpoint is read."""
    hashed = patch.object(manifest, "sha256", wraps=manifest.sha256)
    with _checkpoint() as path, hashed as calls:
        for rank in range(ranks):
            world: Any = SimpleNamespace(rank=rank, size=ranks)
            sharded_checkpoint._verify_files_of_rank(path, world=world)
        assert calls.call_count == len(manifest.read_manifest(path).files)
    return calls.call_count
