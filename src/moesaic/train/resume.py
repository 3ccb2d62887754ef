"""Resume: where a run starts, and why it may not start there."""

from pathlib import Path

from moesaic.checkpoint.full_checkpoint import find_latest_checkpoint
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.config import Choice
from moesaic.core.errors import CheckpointError

# What may differ from the run that saved: how long, and what is watched and written.
MONITORING_KEYS = (
    "name",
    "steps",
    "checkpoint",
    "validation",
    "log",
    "max_bad_steps",
    "collective_timeout_s",
)
CHANGEABLE_KEYS = (
    *MONITORING_KEYS,
    "parallel",
)  # and how it is laid over its ranks, which changes nothing else
# What may differ, but is said: a run that diverged goes on with smaller updates.
REPORTED_KEYS = ("optimizer.lr", "optimizer.adamw.lr", "schedule", "clip_norm", "spikes")


class Resume(Choice):
    """Family: ``StartFresh``, ``ResumeLatest`` or ``ResumeFrom``."""

    def find_checkpoint(self, run_dir: RunDir) -> Path | None:
        """Return the checkpoint to continue from; None starts anew. Raises CheckpointError."""
        raise NotImplementedError

    def skipped_checkpoints(self, run_dir: RunDir) -> tuple[str, ...]:  # noqa: ARG002
        """Return a sentence for each newer checkpoint that could not be used."""
        return ()


class StartFresh(Resume):
    """Start anew, in a directory that holds no run."""

    def find_checkpoint(self, run_dir: RunDir) -> Path | None:
        allowed = (run_dir.config.name, run_dir.tokenizer.name)
        held = sorted(p.name for p in run_dir.path.glob("*") if p.name not in allowed)
        if held:
            raise CheckpointError(
                f"{run_dir.path} is not empty (it holds {', '.join(held[:4])}). To continue the run "
                "in it: --resume auto; to start anew: choose another --out, or remove it"
            )
        return None


START_FRESH = StartFresh()


class ResumeLatest(Resume):
    """Continue from the newest valid checkpoint of the directory; start anew if there is none."""

    def find_checkpoint(self, run_dir: RunDir) -> Path | None:
        return find_latest_checkpoint(run_dir.checkpoints).path

    def skipped_checkpoints(self, run_dir: RunDir) -> tuple[str, ...]:
        return find_latest_checkpoint(run_dir.checkpoints).skipped


class ResumeFrom(Resume):
    """Continue from ``path``: a checkpoint, or the newest one of a run directory."""

    path: str

    def find_checkpoint(self, run_dir: RunDir) -> Path | None:  # noqa: ARG002
        given = Path(self.path)
        if (given / "manifest.json").is_file():
            return given
        found = find_latest_checkpoint(RunDir(given).checkpoints)
        if found.path is None:
            why = f": {' | '.join(found.skipped)}" if found.skipped else ""
            raise CheckpointError(f"{given}: no valid checkpoint to resume from{why}")
        return found.path

    def skipped_checkpoints(self, run_dir: RunDir) -> tuple[str, ...]:  # noqa: ARG002
        given = Path(self.path)
        exact = (given / "manifest.json").is_file()
        return () if exact else find_latest_checkpoint(RunDir(given).checkpoints).skipped
