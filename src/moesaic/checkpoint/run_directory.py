"""Run directory: the names of the files in a run directory (also of an exported model)."""

from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import CheckpointError, did_you_mean
from moesaic.core.file_reader import MAX_INT, MIB, FileKind, require_no_link_out

SUMMARY_FILE = FileKind(name="summary of scores", max_bytes=16 * MIB, error=CheckpointError)
INSIGHT_FILE = FileKind(name="analysis of routing", max_bytes=64 * MIB, error=CheckpointError)
PERPLEXITY_FILE = FileKind(name="perplexity of texts", max_bytes=16 * MIB, error=CheckpointError)
HEAD_SCORES_FILE = FileKind(name="scores of a head", max_bytes=64 * MIB, error=CheckpointError)
SCORE_CURVE_FILE = FileKind(name="learning curve", max_bytes=16 * MIB, error=CheckpointError)
RUN_FILE = FileKind(name="file of a run", max_bytes=MAX_INT, error=CheckpointError)
WEIGHT_FILES = ("config.yaml", "model.safetensors")
TEXT_MODEL_FILES = ("config.yaml", "tokenizer.json", "model.safetensors")


class _PathIn:
    """A path relative to the run directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "RunDir", owner: type["RunDir"]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunDir:
    """Paths of the files of a run; they need not exist."""

    path: Path

    lock = _PathIn("run.lock")  # while a job trains in it, see run_lock.py
    record = _PathIn("run.json")  # which files belong together, see run_record.py
    plugins = _PathIn("plugins")  # Python files of the user that the config needs, as text
    config = _PathIn("config.yaml")  # the complete resolved config
    tokenizer = _PathIn("tokenizer.json")
    vocabulary = _PathIn("vocabulary.json")  # roles of a tokenizer that moesaic did not train
    text_rules = _PathIn("text_rules.json")  # of the corpus: what the model's text passes
    model = _PathIn("model.safetensors")  # the exported weights, independent of the checkpoints
    adapter = _PathIn("adapter.safetensors")  # what was trained beside the weights of another run
    card = _PathIn("README.md")
    directions = _PathIn("directions.json")  # what was trained: streams of the data mixture
    checkpoints = _PathIn("checkpoints")
    metrics = _PathIn("metrics.jsonl")
    tensorboard = _PathIn("tensorboard")
    usage = _PathIn("usage.json")
    health = _PathIn("health.json")  # the router findings of training, by step
    insight = _PathIn("insight.json")  # what routers depend on, measured on held-out text
    routes = _PathIn("routes")  # recorded routing of training steps, one file per step
    routing_snapshots = _PathIn("learning")  # of held-out text during training, one file per step
    timelines = _PathIn("timelines")  # operations of a step, one Chrome trace per rank
    summary = _PathIn("summary.json")
    forgetting = _PathIn("forgetting.json")  # scores of what a warm start was not tuned in
    perplexity = _PathIn("perplexity.json")  # of a language model, by language and domain
    head_scores = _PathIn("head-scores.json")  # of a run without vocabulary head, by label
    score_curve = _PathIn("curve.json")  # scores of the kept checkpoints
    report = _PathIn("report.html")
    imported = _PathIn("imported")  # config and tokenizer as another program wrote them

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
            if (path / "config.json").is_file():
                has = f"; a model of transformers becomes one by moesaic import {path} --out RUN"
            raise CheckpointError(f"{path}: not a run directory, it has no config.yaml{has}")
        run.require_no_links_out()
        return run

    def require_no_links_out(self) -> None:
        """Raise CheckpointError if a file of the run is a link that leads out of its directory.

        A run of somebody else could otherwise have any file read, or written over.
        """
        for path in self.paths():
            if path.is_symlink():
                require_no_link_out(self.path, path.name, kind=RUN_FILE)

    def paths(self) -> tuple[Path, ...]:
        """Return the paths of all files and folders that a run may have."""
        members = (m for m in vars(type(self)).values() if isinstance(m, _PathIn))
        return tuple(self.path / member.name for member in members)

    @property
    def weights(self) -> Path:
        """The file of the weights: of a whole model, or of an adapter of another run's weights."""
        return self.model if self.model.is_file() or not self.adapter.is_file() else self.adapter

    def require_weights(self) -> None:
        """Raise CheckpointError unless config and weights exist; an adapter will do."""
        self._require(WEIGHT_FILES)

    def require_text_model(self) -> None:
        """Raise CheckpointError unless config, tokenizer and weights exist; an adapter will do."""
        self._require(TEXT_MODEL_FILES)

    def require_whole_weights(self) -> None:
        """Raise CheckpointError unless config and the weights of a whole model exist."""
        self.require_weights()
        if self.weights != self.model:
            raise CheckpointError(
                f"{self.path}: it has an adapter without the weights that it changes: "
                f"moesaic ckpt merge {self.path}"
            )

    def _require(self, names: tuple[str, ...]) -> None:
        replaced = {self.model.name} if self.adapter.is_file() else set()
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing := [name for name in missing if name not in replaced]:
            raise CheckpointError(
                f"{self.path}: {', '.join(missing)} missing, expected a trained model. "
                f"If training was stopped, finish it: moesaic train --resume {self.path}"
            )
