"""Training data: the family of what a run is trained on, and what a member of it provides.

``TextData`` (``text_data.py``) reads a corpus with a tokenizer. A member of your own makes batches
of anything that the model's input reads and its head predicts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moesaic.checkpoint.model_card import DataSource
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.config import Choice
from moesaic.data.batch import Batch
from moesaic.data.batch_stream import DataReplica
from moesaic.distributed.world import World
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims


class BatchLoader(Protocol):
    """An endless iterator of one replica's batches, deterministic given its state.

    ``labels`` names the labels of rows by group, those of ``Batch.groups``. ``final_notes`` are
    sentences to print when training ends. ``num_draws`` counts rows drawn by all replicas,
    ``skipped`` those of them that were left out, by name.
    """

    @property
    def labels(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def skipped(self) -> Mapping[str, int]: ...
    @property
    def num_draws(self) -> int: ...
    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def held_out_batches(self, split: str, *, rows: int | None) -> Iterator[Batch]: ...
    def final_notes(self) -> list[str]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Preparation:
    """Where and how data is prepared: the run directory, the ranks, and where notes go.

    ``way_out`` says what to do about a language that the run directory's tokenizer has no tag for.
    """

    run_dir: RunDir
    world: World
    notify: Callable[[str], None]
    way_out: str = ""


class PreparedData(ABC):
    """Data that is ready to be read, the same on every rank."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Return the fingerprints of what every rank must read."""

    def require_fits(self, model: ModelConfig) -> None:  # noqa: B027 - data without ids fits any
        """Raise ConfigError unless the model has a row for every id, and the like."""

    @abstractmethod
    def make_loader(self, replica: DataReplica, *, seed: int) -> BatchLoader:
        """Return the loader of one data-parallel rank. Raises ConfigError or DataError."""

    def record(self, run_dir: RunDir, *, seed: int) -> None:
        """Write what is trained on into the run directory, on rank 0."""
        del run_dir, seed

    def validation_notes(self, run_dir: RunDir) -> list[str]:
        """Return sentences about what validation cannot score, after ``record``."""
        del run_dir
        return []


class TrainingData(Choice):
    """What a run is trained on: ``TextData`` (a corpus), or a member of your own."""

    def task_names(self) -> tuple[str, ...]:
        """Return the names of the tasks, in the order of their numbers in a batch."""
        raise NotImplementedError

    def batch_dims(self, model: ModelConfig) -> BatchDims:
        """Return the size of a typical micro-batch over all ranks, for estimates."""
        raise NotImplementedError

    def max_batch_tokens(self) -> int:
        """Return the most tokens (positions) of a micro-batch over all ranks."""
        raise NotImplementedError

    def prepare(self, place: Preparation) -> PreparedData:
        """Make what reading needs (shards, a tokenizer), once. Collective.

        Raises DataError or ConfigError.
        """
        raise NotImplementedError

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield a sentence, with the config keys, for each thing that does not fit the model."""
        del model
        yield from ()

    def shrink(self, *, vocab_size: int) -> "TrainingData":
        """Return the data for a model whose vocabulary was made small (``verify``)."""
        del vocab_size
        return self

    def sources(self, run_dir: RunDir) -> list[DataSource]:
        """Return what the data was made from, for the model card."""
        del run_dir
        return []
