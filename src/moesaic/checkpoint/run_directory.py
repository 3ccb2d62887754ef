"""Run directory: the names of the files in a run directory (also of an exported model)."""

from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import CheckpointError, did_you_mean

MODEL_FILES = ("config.yaml", "tokenizer.json", "model.safetensors")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of the files of a run; they need not exist."""

    path: Path

    @property
    def config(self) -> Path:
        """The complete resolved config of the run."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def model(self) -> Path:
        """The exported weights, independent of the checkpoints."""
        return self.path / "model.safetensors"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def usage(self) -> Path:
        return self.path / "usage.json"

    @property
    def insight(self) -> Path:
        """What routers depend on, measured on held-out text."""
        return self.path / "insight.json"

    @property
    def routes(self) -> Path:
        """Recorded routing of training steps, one file per step."""
        return self.path / "routes"

    @property
    def routing_snapshots(self) -> Path:
        """Routing of the same held-out text during training, one file per step."""
        return self.path / "learning"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def score_curve(self) -> Path:
        """Scores of the kept checkpoints."""
        return self.path / "curve.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """Open an existing run directory. Raises CheckpointError for any other path."""
        run = cls(path)
        if not path.is_dir():
            siblings = path.parent.iterdir() if path.parent.is_dir() else ()
            names = [p.name for p in siblings if cls(p).config.is_file()]
            raise CheckpointError(f"{path}: no such run directory{did_you_mean(path.name, names)}")
        if not run.config.is_file():
            runs = [p.name for p in path.iterdir() if cls(p).config.is_file()]
            has = f"; it contains the runs {', '.join(sorted(runs))}" if runs else ""
            raise CheckpointError(f"{path}: not a run directory, it has no config.yaml{has}")
        return run

    def require_model(self) -> None:
        """Raise CheckpointError unless config, tokenizer and weights exist."""
        missing = [name for name in MODEL_FILES if not (self.path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {', '.join(missing)} missing, expected a trained model. "
                f"If training was stopped, finish it: moesaic train --resume {self.path}"
            )
