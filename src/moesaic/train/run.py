"""Run: everything that decides a training run, as one frozen config.

Two runs with equal configs on the same machine give the same weights, bit for bit.

Precision: the number format of the matrix products of a training step.

Weights, gradients and optimizer state stay float32 either way; routing is float32 inside the layer.

MetricsSink: where rows of metrics go besides ``metrics.jsonl``.

CorpusSource: where the text of a run comes from.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.config import Choice, Config
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig
from moesaic.data.train_tokenizer import TokenizerConfig
from moesaic.model.config import ModelConfig
from moesaic.monitor.metric_writers import MetricWriter, TensorBoardWriter
from moesaic.optim.lr_schedule import WSD, LRSchedule
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.train.bad_steps import IgnoreSpikes, SpikePolicy


class Precision(Choice):
    """Family: ``Float32`` (the default) or ``BFloat16``."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context that the forward pass runs in."""
        raise NotImplementedError


class Float32(Precision):
    """Everything in float32."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()


class BFloat16(Precision):
    """Matrix products in bfloat16 by autocast; faster only where the machine multiplies it."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16)


class MetricsSink(Choice):
    """Family of optional sinks."""

    def open(self, run_dir: RunDir, *, step: int) -> MetricWriter:
        """Return the sink of a run that starts after ``step``. Raises UserError if it cannot."""
        raise NotImplementedError


class TensorBoard(MetricsSink):
    """Event files under the run directory; needs ``pip install "moesaic[tb]"``."""

    def open(self, run_dir: RunDir, *, step: int) -> MetricWriter:
        return TensorBoardWriter(run_dir.tensorboard, purge_after=step)


class CorpusSource(Choice):
    """Family: ``NamedCorpus`` (a corpus with a name), ``BuiltCorpus``, ``CorpusFolder`` (on disk)."""

    def open(self) -> Corpus:
        """Return the corpus, building it first where that is possible. Raises DataError."""
        raise NotImplementedError


class NamedCorpus(CorpusSource):
    """A corpus with a name, e.g. ``catalogues-small``; built once, under the data home."""

    name: str

    def open(self) -> Corpus:
        return build_corpus(self.name)


class BuiltCorpus(CorpusSource):
    """A corpus built by a recipe of one's own (one's files, say), once, under the data home."""

    recipe: CorpusRecipe

    def open(self) -> Corpus:
        return build_corpus(self.recipe)


class CorpusFolder(CorpusSource):
    """A corpus directory (with its ``corpus.json``), for text of one's own."""

    path: str

    def open(self) -> Corpus:
        return Corpus.open(Path(self.path))


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
    """A row of metrics every ``every`` steps; one step of ``routing_stats_every`` counts its routing.

    Rows go to ``metrics.jsonl`` and to the sinks of ``sinks``. One step of ``routing_trace_every`` has its
    routing recorded, token by token; a few held-out rows are routed every ``routing_probe_every`` steps, to
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
    corpus. A step is ``gradient_accumulation_steps`` micro-batches of ``loader.batch_tokens`` tokens over all ranks
    together. After ``max_bad_steps`` non-finite steps in a row the run stops with a checkpoint;
    ``spikes`` says what becomes of a step that is finite but far off.
    ``parallel`` says how it is laid over its ranks; it changes nothing else.
    A rank that keeps the others waiting for ``collective_timeout_s`` seconds ends the run with an error.
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
