"""Entry point of training: ``train(run, out)`` goes from a config to a trained run directory."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from moesaic.checkpoint.full_checkpoint import (
    LatestCheckpoint,
    config_differences,
    read_verified_state,
    require_same_config,
)
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.plugins import record_plugins
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_lock import RunLock
from moesaic.checkpoint.run_record import read_run_record, write_run_record
from moesaic.checkpoint.trained_directions import read_trained_directions
from moesaic.core.config_upgrade import upgrade_config
from moesaic.core.errors import CheckpointError, ConfigError, printable
from moesaic.core.files import atomic_write
from moesaic.core.freed_memory import keep_freed_memory
from moesaic.core.thread_waiting import waiting_advice
from moesaic.data.batch_stream import DataReplica
from moesaic.data.vocabulary_file import copy_tokenizer
from moesaic.distributed.compare_ranks import require_same_on_all_ranks, version_facts
from moesaic.distributed.flight_recorder import mark_phase
from moesaic.distributed.initialize import init_distributed
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.distributed.world import World
from moesaic.memory.disk_store import DiskFullError
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.transformer import Transformer
from moesaic.monitor.metric_writers import JsonlWriter, MetricWriter, MultiWriter
from moesaic.monitor.progress_display import ProgressDisplay, RunStatus
from moesaic.nn.initializer import draw_seed
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.train.export import export_model
from moesaic.train.failed_start import empty_folders_removed, nothing_left_on_failure
from moesaic.train.loop import StopReason, StopRequest, TrainingResult, training_loop
from moesaic.train.random_state import seed_rank
from moesaic.train.resume import (
    CHANGEABLE_KEYS,
    REPORTED_KEYS,
    START_FRESH,
    Resume,
    learning_rate_jump,
)
from moesaic.train.routing_hooks import RouterHealthHook, RoutingProbeHook, RoutingTraceHook
from moesaic.train.run import Run
from moesaic.train.run_checks import check_run
from moesaic.train.sparse_selection import selection_hooks
from moesaic.train.timeline_hook import TimelineHook
from moesaic.train.trainer import NonFiniteError, Trainer
from moesaic.train.training_data import BatchLoader, Preparation, PreparedData
from moesaic.train.training_hooks import (
    CheckpointHook,
    Hook,
    MakeDisplay,
    MetricsLogHook,
    StragglerHook,
    ValidationHook,
    no_progress,
    terminal_progress,
)
from moesaic.train.warm_start import WeightsOfRun


def train(
    run: Run,
    out: Path | str,
    *,
    resume: Resume = START_FRESH,
    until: int | None = None,
    hooks: Sequence[Hook] = (),
    progress: MakeDisplay = terminal_progress,
) -> TrainingResult:
    """Train ``run`` in the directory ``out``, in one process or as one rank under torchrun.

    ``until`` stops after that step (the schedule still ends at ``run.steps``). ``hooks`` run after
    the standard hooks. Raises UserError: a config that cannot work, a directory of another run, an
    unreadable corpus, a full disk, too many non-finite steps.
    """
    check_run(run)
    last = _last_step(run, until=until)
    run_dir, started = RunDir(Path(out)), time.monotonic()
    with (
        init_distributed(timeout_s=run.collective_timeout_s) as world,
        nullcontext(_common_run(run, until=until, world=world)) as run,
        _locked(run_dir, world) as lock_notes,
    ):
        display = (progress if world.rank == 0 else no_progress)(_run_status(run))
        _note_all(display, [*lock_notes, *filter(None, [waiting_advice()])])
        with nothing_left_on_failure(run_dir, world=world):
            found = resume.find_checkpoint(run_dir, world=world)
            start = run_on_rank0(world, lambda: _open_run_dir(run_dir, run=run, found=found))
            _note_all(display, start["notes"])
            prepared = _prepare_data(run, run_dir=run_dir, world=world, display=display)
            trainer, standard = _start_trainer(
                run, prepared=prepared, run_dir=run_dir, world=world, checkpoint=start["path"]
            )
            writers = _open_writers(trainer, run_dir=run_dir)
        if start["path"] is not None:
            display.note(f"resuming after step {trainer.step:,}, from {start['path']}")
        log = MetricsLogHook(writer=writers, progress=display)
        hooks = [*standard, log, *hooks, CheckpointHook(run_dir.checkpoints, flush=log.flush)]
        with StopRequest():  # Ctrl-C that is pressed again does not end the export
            try:
                stop_reason = training_loop(trainer, hooks=hooks, until=last)
                tokens = trainer.metrics.total_tokens(world)
                mark_phase("export")
                export_model(trainer, run_dir=run_dir, tokens=tokens)
            except (NonFiniteError, DiskFullError) as error:
                saved = f"The last good state is saved. {_resume_hint(run_dir)}"
                raise type(error)(f"{error}. {saved}") from None
            finally:
                trainer.data.close()
                log.close()
        _note_all(display, _final_notes(trainer, run_dir=run_dir, stop_reason=stop_reason))
        return TrainingResult(
            out=run_dir.path,
            steps=trainer.step,
            tokens=int(tokens),
            seconds=time.monotonic() - started,
            metrics=dict(trainer.event_log.latest_values),
            stop_reason=stop_reason,
        )


def _common_run(run: Run, *, until: int | None, world: World) -> Run:
    """Return the run of all ranks; one of adapters has what it takes from what it starts from.

    Ranks whose runs differ must not make the directory. Rank 0 alone reads the other run.
    """
    mark_phase("comparing the ranks")
    facts = {**version_facts(), **run.to_dict(), "until": until}
    require_same_on_all_ranks(facts, world=world, what="versions and config")
    if not run.trainable.keeps_base:
        return run

    def resolved() -> dict[str, Any]:
        start = run.initial_weights.pinned()
        base = RunDir(Path(start.path)) if isinstance(start, WeightsOfRun) else None
        return run.replace(initial_weights=start, trainable=run.trainable.resolved(base)).to_dict()

    mark_phase("reading what adapters are trained beside")
    return Run.from_dict(run_on_rank0(world, resolved))


def _prepare_data(
    run: Run, *, run_dir: RunDir, world: World, display: ProgressDisplay
) -> PreparedData:
    mark_phase("preparing the data")
    way_out = run.initial_weights.way_out
    prepared = run.data.prepare(Preparation(run_dir, world, display.note, way_out))
    prepared.require_fits(run.model)
    require_same_on_all_ranks(prepared.facts(), world=world, what="data")
    record = partial(_record_run, run, prepared=prepared, run_dir=run_dir)
    _note_all(display, run_on_rank0(world, record))
    return prepared


def _last_step(run: Run, *, until: int | None) -> int:
    if until is not None and until < 1:
        raise ConfigError([f"until: found {until}, expected a step of at least 1"])
    return run.steps if until is None else min(until, run.steps)


@contextmanager
def _locked(run_dir: RunDir, world: World) -> Iterator[list[str]]:
    """Hold the lock of a run directory on rank 0; yield a note if a stale one was replaced."""
    held: list[RunLock] = []

    def acquire() -> list[str]:
        run_dir.require_no_links_out()
        held.append(RunLock.acquire(run_dir.lock))
        return [held[0].note] if held[0].note else []

    with empty_folders_removed(run_dir.path) if world.rank == 0 else nullcontext():
        notes = run_on_rank0(world, acquire)
        try:
            yield notes
        finally:
            for lock in held:
                lock.release()


def _run_status(run: Run) -> RunStatus:
    losses = tuple(f"train/loss/{name}" for name in run.data.task_names())
    return RunStatus(steps=run.steps, losses=losses)


def _start_trainer(
    run: Run, *, prepared: PreparedData, run_dir: RunDir, world: World, checkpoint: str | None
) -> tuple[Trainer, list[Hook]]:
    """Return the trainer, from its checkpoint if there is one, and its standard hooks."""
    mark_phase("making the model")
    reads_all = checkpoint is not None and not run.trainable.keeps_base
    start = _loaded_later if reads_all else None
    if world.device.type == "cpu" and run.parallel.memory == MemoryPlan():
        keep_freed_memory()  # with memory tiers a run shall hold little instead
    trainer = make_trainer(run, prepared=prepared, world=world, start=start)
    standard = standard_hooks(trainer, run_dir=run_dir)  # they add what a checkpoint restores
    if checkpoint is not None:
        mark_phase("resuming")
        load_saved_state(trainer, Path(checkpoint))
    return trainer, standard


class StartShards(Protocol):
    """What gives a rank's shards, which have memory, their values: ``InitialWeights.fill``."""

    def __call__(self, parallel_model: ParallelModel, *, seed: int) -> None: ...


def _loaded_later(parallel_model: ParallelModel, *, seed: int) -> None:
    """Leave the shards as they are: a checkpoint is loaded into them next."""
    del parallel_model, seed


def make_trainer(
    run: Run, *, prepared: PreparedData, world: World, start: StartShards | None = None
) -> Trainer:
    """Return a trainer of a run on its prepared data, with its own or another start."""
    make_loader = partial(prepared.make_loader, seed=run.seed)
    return seeded_trainer(run, make_loader=make_loader, world=world, start=start)


def seeded_trainer(
    run: Run,
    *,
    make_loader: Callable[[DataReplica], BatchLoader],
    world: World,
    start: StartShards | None = None,
) -> Trainer:
    """Return a trainer at step 0: the same weights, but different random streams, on all ranks.

    No rank allocates more than its shards. ``start`` fills them; None leaves it to the run.
    """
    torch.manual_seed(run.seed)
    fill = partial(start or run.initial_weights.fill, seed=draw_seed())
    model = Transformer.without_values(run.model)
    seed_rank(run.seed, world=world)
    replica = DataReplica(*run.parallel.plan.resolve(world.size).data_shard(world.rank))
    return Trainer(run, model=model, data=make_loader(replica), world=world, fill=fill)


def standard_hooks(trainer: Trainer, *, run_dir: RunDir) -> list[Hook]:
    """Return the hooks of every run that come before the metrics log."""
    return [
        *selection_hooks(trainer),
        ValidationHook(),
        RouterHealthHook(run_dir.usage, trainer=trainer, findings=run_dir.health),
        RoutingTraceHook(run_dir.routes),
        RoutingProbeHook(run_dir.routing_snapshots),
        StragglerHook(),
        TimelineHook(run_dir),
    ]


def _open_run_dir(run_dir: RunDir, *, run: Run, found: LatestCheckpoint) -> dict[str, Any]:
    """Prepare the run directory on rank 0; return the checkpoint to start from, and notes."""
    path, notes = found.path, [f"skipped {why}" for why in found.skipped]
    if path is not None:
        saved, current = _saved_config(path), run.to_dict()
        ignored = (*CHANGEABLE_KEYS, *REPORTED_KEYS)
        require_same_config(saved, current=current, where=path, ignored=ignored)
        _require_same_base(saved, run=run, where=path)
        changed = config_differences(saved, current).items()
        notes += [f"{k}: was {a}, now {b}" for k, (a, b) in changed if k.startswith(REPORTED_KEYS)]
        notes += learning_rate_jump(saved, run=run, step=read_manifest(path).step)
        tokenizer = RunDir(path.parent.parent).tokenizer
        if not run_dir.tokenizer.is_file() and tokenizer.is_file():
            copy_tokenizer(tokenizer, to=run_dir.tokenizer)
        earlier = read_trained_directions(RunDir(path.parent.parent).directions)
        if earlier is not None and not run_dir.directions.is_file():
            earlier.write(run_dir.directions)
    elif note := run.initial_weights.prepare(run_dir, model=run.model, trainable=run.trainable):
        notes.append(note)
    atomic_write(run_dir.config, run.to_yaml())
    return {"path": None if path is None else str(path), "notes": notes}


def _require_same_base(saved: dict[str, Any], *, run: Run, where: Path) -> None:
    """Raise CheckpointError if adapters of a checkpoint are for other weights than the run's."""
    start, before = run.initial_weights, saved.get("initial_weights", {}).get("sha256")
    now = start.sha256 if isinstance(start, WeightsOfRun) else None
    if run.trainable.keeps_base and before != now:
        raise CheckpointError(
            f"{where}: its adapters are for weights with the hash {str(before)[:12]}, found "
            f"{str(now)[:12]} (initial_weights): name the run that they were trained beside"
        )


def _record_run(run: Run, *, prepared: PreparedData, run_dir: RunDir) -> list[str]:
    """Record what is trained on, and the files of the run; the weights stay as recorded before."""
    prepared.record(run_dir, seed=run.seed)
    before = read_run_record(run_dir)
    weights = {} if before is None else before.files
    write_run_record(
        run_dir,
        config=run.to_dict(),
        plugins=record_plugins(run, run_dir.plugins),
        known={run_dir.model.name: weights.get(run_dir.model.name)},
    )
    return prepared.validation_notes(run_dir) if run.validation.every else []


def _saved_config(checkpoint: Path) -> dict[str, Any]:
    """Return the run config in a checkpoint, with the present names.

    A key that is new since then has its default. Of a config that is not valid now, the plain
    values are returned, so that the differences can be named.
    """
    upgraded, _ = upgrade_config(read_verified_state(checkpoint).get("config"))
    if not isinstance(upgraded, dict):
        raise CheckpointError(f"{checkpoint}: its state has no config, so it is of no run")
    try:
        return Run.from_dict(upgraded).to_dict()
    except ConfigError:
        return upgraded


def load_saved_state(trainer: Trainer, path: Path) -> None:
    """Load a verified checkpoint, whose state may still be of another kind than a run's."""
    try:
        trainer.load_verified_checkpoint(path)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        found = f"{type(error).__name__}: {printable(str(error))}"
        raise CheckpointError(f"{path}: its state does not fit this run ({found})") from error


def _note_all(display: ProgressDisplay, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        display.note(sentence)


def _final_notes(trainer: Trainer, *, run_dir: RunDir, stop_reason: StopReason) -> Iterator[str]:
    """Yield the notes of the loader, and one on how to resume after a signal."""
    yield from trainer.data.final_notes()
    if stop_reason.startswith("SIG"):
        yield f"{stop_reason}: saved after step {trainer.step:,}. {_resume_hint(run_dir)}"


def _open_writers(trainer: Trainer, *, run_dir: RunDir) -> MetricWriter:
    if trainer.world.rank:
        return MultiWriter()
    rows = JsonlWriter(run_dir.metrics)
    rows.truncate_after(trainer.step)
    return MultiWriter([rows, *(s.open(run_dir, step=trainer.step) for s in trainer.run.log.sinks)])


def _resume_hint(run_dir: RunDir) -> str:
    return f"Continue with: moesaic train --resume {run_dir.path}"
