"""RunDir: the one place that knows the names inside a run directory (a model directory too)."""

from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import CheckpointError, did_you_mean
from moesaic.core.files import atomic_write

MODEL_FILES = ("config.yaml", "tokenizer.json", "model.safetensors")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths under ``path``. Nothing need exist yet."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole resolved config of the run."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def model(self) -> Path:
        """The weights to use: exported at the end, and readable without the checkpoints."""
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
        """What routers were found to read, on held-out text."""
        return self.path / "insight.json"

    @property
    def routes(self) -> Path:
        """Recorded routing of training steps, a file each."""
        return self.path / "routes"

    @property
    def routing_snapshots(self) -> Path:
        """Routing of the same held-out text at several steps of training, a file each."""
        return self.path / "learning"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def score_curve(self) -> Path:
        """Scores of the kept checkpoints, one after the other."""
        return self.path / "curve.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @classmethod
    def create(cls, path: Path, *, config_yaml: str) -> "RunDir":
        """Make the directory and write its config. An existing config is left in its place."""
        run = cls(path)
        path.mkdir(parents=True, exist_ok=True)
        if not run.config.exists():
            atomic_write(run.config, config_yaml)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """Return an existing run directory. Raises CheckpointError if it is none."""
        run = cls(path)
        if not path.is_dir():
            beside = path.parent.iterdir() if path.parent.is_dir() else ()
            names = [p.name for p in beside if cls(p).config.is_file()]
            raise CheckpointError(f"{path}: no such run directory{did_you_mean(path.name, names)}")
        if not run.config.is_file():
            inside = [p.name for p in path.iterdir() if cls(p).config.is_file()]
            has = f"; it holds the runs {', '.join(sorted(inside))}" if inside else ""
            raise CheckpointError(f"{path}: not a run directory, it has no config.yaml{has}")
        return run

    def require_model(self) -> None:
        """Raise CheckpointError unless config, tokenizer and weights are all here."""
        missing = [name for name in MODEL_FILES if not (self.path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {', '.join(missing)} missing, expected a trained model. "
                f"If training was stopped, finish it: moesaic train --resume {self.path}"
            )
