"""Run: everything that decides a training run, as one frozen config.

Two runs with equal configs on the same machine give the same weights, bit for bit.
"""

from typing import Annotated

from pydantic import Field

from moesaic.core.config import Config
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig
from moesaic.data.train_tokenizer import TokenizerConfig
from moesaic.model.config import ModelConfig
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.optim.schedule import WSD, LRSchedule
from moesaic.parallel.config import ParallelConfig
from moesaic.train.precision import Float32, Precision
from moesaic.train.sinks import MetricsSink
from moesaic.train.source import CorpusSource
from moesaic.train.spikes import SpikePolicy, IgnoreSpikes

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class CheckpointConfig(Config):
    """When to save: after every ``every`` steps (0: only at the end), keeping the newest ``keep``.

    The checkpoint with the best validation loss is kept beside them.
    """

    every: Natural = 500
    keep: Positive = 2


class ValidationConfig(Config):
    """Loss on held-out text every ``every`` steps (0: never): ``rows`` per task and direction."""

    every: Natural = 500
    rows: Positive = 64


class LogConfig(Config):
    """A row of metrics every ``every`` steps; one step of ``routes_every`` counts its routing.

    Rows go to ``metrics.jsonl`` and to the sinks of ``also``. One step of ``record_every`` has its
    routing recorded, token by token; a few held-out rows are routed every ``probe_every`` steps, to
    see when routing settles (both 0: never).
    """

    every: Positive = 10
    routing_stats_every: Positive = 10
    routing_trace_every: Natural = 0
    routing_probe_every: Natural = 50
    sinks: tuple[MetricsSink, ...] = ()

    def is_due(self, step: int, *, steps: int) -> bool:
        """Whether a row is written after ``step`` of ``steps``."""
        return step % self.every == 0 or step == steps


class Run(Config):
    """One training run.

    ``languages`` may be spelt any way (``de``, ``German``, ``deu_Latn``); empty means all of the
    corpus. A step is ``accumulate`` micro-batches of ``loader.batch_tokens`` tokens over all ranks
    together. After ``max_bad_steps`` non-finite steps in a row the run stops with a checkpoint;
    ``spikes`` says what becomes of a step that is finite but far off.
    ``parallel`` says how it is laid over its ranks; it changes nothing else.
    A rank that keeps the others waiting for ``patience_s`` seconds ends the run with an error.
    """

    name: str
    seed: Natural = 1
    corpus: CorpusSource
    languages: tuple[str, ...] = ()
    tokenizer: TokenizerConfig
    mixture: MixtureConfig
    loader: LoaderConfig
    model: ModelConfig
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
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
