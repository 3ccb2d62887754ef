"""Resuming: which checkpoint a run starts from, and which config keys may differ from it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moesaic.checkpoint.full_checkpoint import LatestCheckpoint
from moesaic.checkpoint.manifest import MANIFEST_FILE
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.sharded_checkpoint import find_verified_checkpoint, verify_on_all_ranks
from moesaic.core.config import Choice
from moesaic.core.errors import CheckpointError
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.distributed.world import World
from moesaic.train.run import Run

# Keys that may differ from the config in the checkpoint: length, monitoring, parallel layout.
CHANGEABLE_KEYS = (
    "name",
    "initial_weights",
    "steps",
    "checkpoint",
    "validation",
    "log",
    "max_bad_steps",
    "collective_timeout_s",
    "parallel",
)
# Keys that may differ and are then reported, e.g. to continue a diverged run with a lower rate.
REPORTED_KEYS = (
    "optimizer.lr",
    "optimizer.router_lr",
    "optimizer.adamw.lr",
    "optimizer.adamw.router_lr",
    "schedule",
    "clip_norm",
    "precision",
    "spikes",
)


class Resume(Choice):
    """Where a run starts: ``StartFresh``, ``ResumeLatest`` or ``ResumeFrom``."""

    def find_checkpoint(self, run_dir: RunDir, *, world: World) -> LatestCheckpoint:
        """Return the checkpoint to continue from, without a path to start at step 0.

        Its files have been hashed, each on one of the ranks. Collective. Raises CheckpointError.
        """
        raise NotImplementedError


class StartFresh(Resume):
    """Start at step 0, in a directory without a run."""

    def find_checkpoint(self, run_dir: RunDir, *, world: World) -> LatestCheckpoint:
        run_on_rank0(world, lambda: self._require_no_run(run_dir))
        return LatestCheckpoint(None)

    def _require_no_run(self, run_dir: RunDir) -> None:
        # what is written before the first step, e.g. by a job that was killed
        started = (run_dir.config, run_dir.tokenizer, run_dir.vocabulary, run_dir.text_rules)
        started += (run_dir.lock,)
        allowed = {path.name for path in started}
        others = sorted(p.name for p in run_dir.path.glob("*") if p.name not in allowed)
        if others:
            raise CheckpointError(
                f"{run_dir.path} is not empty (it has {', '.join(others[:4])}). To continue its "
                "run: --resume auto; to start a new one: choose another --out, or remove it"
            )


START_FRESH = StartFresh()


class ResumeLatest(Resume):
    """Continue from the newest valid checkpoint of the run directory, else start at step 0."""

    def find_checkpoint(self, run_dir: RunDir, *, world: World) -> LatestCheckpoint:
        return find_verified_checkpoint(run_dir.checkpoints, world=world)


class ResumeFrom(Resume):
    """Continue from ``path``: a checkpoint, or the newest valid one of a run directory."""

    path: str

    def find_checkpoint(
        self,
        run_dir: RunDir,  # noqa: ARG002
        *,
        world: World,
    ) -> LatestCheckpoint:
        path = Path(self.path)
        if run_on_rank0(world, lambda: (path / MANIFEST_FILE).is_file()):
            verify_on_all_ranks(path, world=world)
            return LatestCheckpoint(path)
        found = find_verified_checkpoint(RunDir(path).checkpoints, world=world)
        if found.path is None:
            why = f": {' | '.join(found.skipped)}" if found.skipped else ""
            raise CheckpointError(f"{path}: no valid checkpoint to resume from{why}")
        return found


def learning_rate_jump(saved: Mapping[str, Any], *, run: Run, step: int) -> Iterator[str]:
    """Yield a sentence if the learning rate jumps where a run with other steps is resumed.

    A schedule that decays over the end of a run starts again at its full rate when a finished run
    gets more steps. ``saved`` is the plain config in the checkpoint of ``step``. Of it, only steps
    and schedule are read: another key may have a value that is refused by now, as a run's name.
    """
    read = {key: saved[key] for key in ("steps", "schedule") if key in saved}
    earlier = Run.from_dict(run.to_dict() | read)
    steps = earlier.steps
    if step == 0 or steps == run.steps:
        return
    before = earlier.schedule.lr_factor(step - 1, steps=steps)
    after = run.schedule.lr_factor(step, steps=run.steps)
    if abs(after - before) > 0.1 * max(after, before):
        yield (
            f"the learning rate jumps: {before:.3g} of its full value at step {step} (of {steps}), "
            f"{after:.3g} at step {step + 1} (of {run.steps:,}); the decay of schedule= moves with "
            "steps"
        )
