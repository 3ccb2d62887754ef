"""Run: the frozen config of a training run (data, model, optimizer, parallelism, logging).

Two runs with equal configs on the same machine give the same weights, bit for bit.
"""

from typing import Annotated

from pydantic import AfterValidator, Field

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.config import Choice, Config
from moesaic.core.config_errors import show_value
from moesaic.model.config import ModelConfig
from moesaic.monitor.metric_writers import MetricWriter, TensorBoardWriter
from moesaic.optim.lr_schedule import WSD, LRSchedule
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel import trained_weights as trained_weights  # registers choices of adapters
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.precision import Float32, Precision
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters
from moesaic.train import row_data as row_data  # registers its member of TrainingData
from moesaic.train import text_data as text_data  # registers its member of TrainingData
from moesaic.train.bad_steps import IgnoreSpikes, SpikePolicy
from moesaic.train.training_data import TrainingData
from moesaic.train.warm_start import InitialWeights, RandomWeights

MAX_NAME_BYTES = 200  # a file system takes 255, and files are named after a run

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


def _check_name(name: str) -> str:
    """Return the name of a run, which is that of its folder in ``runs/`` and of its jobs."""
    if not name.strip() or name in (".", "..") or "/" in name or not name.isprintable():
        raise ValueError(f"found {show_value(name)}, expected a plain name, without a slash")
    if len(name.encode(errors="surrogatepass")) > MAX_NAME_BYTES:
        raise ValueError(f"found {show_value(name)}, expected at most {MAX_NAME_BYTES} bytes")
    return name


class MetricsSink(Choice):
    """Where rows of metrics go besides ``metrics.jsonl``."""

    def open(self, run_dir: RunDir, *, step: int) -> MetricWriter:
        """Open a writer for a run that continues after ``step``. Raises UserError if it cannot."""
        raise NotImplementedError


class TensorBoard(MetricsSink):
    """Event files under the run directory; needs ``pip install "moesaic[tb]"``."""

    def open(self, run_dir: RunDir, *, step: int) -> MetricWriter:
        return TensorBoardWriter(run_dir.tensorboard, purge_after=step)


class CheckpointConfig(Config):
    """Save a checkpoint every ``every`` steps (0: only at the end) and keep the newest ``keep``.

    The checkpoint with the best validation loss is kept as well.
    """

    every: Natural = 500
    keep: Positive = 2


class ValidationConfig(Config):
    """Held-out loss every ``every`` steps (0: never), on ``rows`` rows per task and direction."""

    every: Natural = 500
    rows: Positive = 64


class LogConfig(Config):
    """Logging intervals in steps: a row of metrics every ``every`` steps.

    Rows go to ``metrics.jsonl`` and to ``sinks``. One step in ``routing_stats_every`` counts which
    experts it used. One step in ``routing_trace_every`` has its routing written token by token, and
    every ``routing_probe_every`` steps a few held-out rows are routed, which shows when routing
    converges (0: never). The operations of step ``timeline_step`` go to ``timelines/``, a Chrome
    trace of each rank (0: none).
    """

    every: Positive = 10
    routing_stats_every: Positive = 10
    routing_trace_every: Natural = 0
    routing_probe_every: Natural = 50
    timeline_step: Natural = 0
    sinks: tuple[MetricsSink, ...] = ()

    def is_due(self, step: int, *, steps: int) -> bool:
        """Whether a row is written after ``step`` of ``steps``."""
        return step % self.every == 0 or step == steps


class Run(Config):
    """Config of one training run.

    ``data`` is what the model is trained on (``TextData``: a corpus and its tokenizer, tasks and
    batches). A step takes ``gradient_accumulation_steps`` micro-batches of the data, each over all
    ranks together. After ``max_bad_steps`` consecutive non-finite steps the run stops with a
    checkpoint; ``spikes`` decides about finite loss spikes.
    ``initial_weights`` may be those of another run (a warm start), of which ``trainable`` are
    changed.
    ``parallel`` distributes the run over its ranks and changes nothing else. If a collective does
    not finish within ``collective_timeout_s``, the run ends with an error.
    """

    name: Annotated[str, AfterValidator(_check_name)]
    seed: Natural = 1
    data: TrainingData
    model: ModelConfig
    initial_weights: InitialWeights = RandomWeights()
    trainable: TrainableParameters = AllParameters()
    optimizer: Optimizer = AdamW()
    schedule: LRSchedule = WSD()
    steps: Positive
    gradient_accumulation_steps: Positive = 1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Precision = Float32()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()
    max_bad_steps: Positive = 5
    spikes: SpikePolicy = IgnoreSpikes()
    collective_timeout_s: Annotated[float, Field(gt=0)] = 120.0
