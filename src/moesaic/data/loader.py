"""The data loader: an endless iterator of batches that resumes at exactly the next one.

Every data-parallel rank makes its own part of the same global batches; their union is the same for
any number of ranks, so that a run may resume on another number. A thread prepares batches ahead.
"""

import hashlib
import json
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from pydantic import Field

from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.core.file_reader import MIB, FileKind, FileShape, parse_shape
from moesaic.data.batch import DOMAIN, SOURCE_LANGUAGE, TARGET_LANGUAGE, TASK, Batch
from moesaic.data.batch_stream import (
    BatchStream,
    DataReplica,
    LoaderConfig,
    LoaderPosition,
    PositionedBatch,
)
from moesaic.data.mixture import Mixture, MixtureConfig, StreamFrequency
from moesaic.data.token_shards import TokenShards
from moesaic.data.tokenizer import Tokenizer

__all__ = ["DataReplica", "Loader", "LoaderConfig"]

STATE_FORMAT = 1
MAX_DRAWS = 2**53  # exact as a float, and far from the end of 64 bits
_SINGLE_REPLICA = DataReplica()

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class PrefetchIterator(Generic[T]):
    """Prefetches up to ``depth`` items of ``source`` in a thread; raises its errors in order.

    The thread is a daemon; ``close()`` ends it.
    """

    def __init__(self, source: Iterator[T], *, depth: int) -> None:
        self._source = source
        self._queue: queue.Queue[T | _Failure] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._failure: _Failure | None = None
        self._thread = threading.Thread(target=self._run, name="moesaic-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> "PrefetchIterator[T]":
        return self

    def __next__(self) -> T:
        if self._failure or self._stop.is_set():  # an exhausted iterator stays exhausted
            raise self._failure.error if self._failure else StopIteration
        item = self._queue.get()
        if isinstance(item, _Failure):
            self._failure = item
            raise item.error
        return item

    def close(self) -> None:
        """End the thread; prefetched items are lost. May be called twice."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
            self._put(_Failure(StopIteration()))
        except BaseException as error:  # raised in the consumer
            self._put(_Failure(error))

    def _put(self, item: T | _Failure) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False


class PrefetchedBatches(ABC, Generic[T]):
    """Iterates over batches that a thread prepares. ``with`` or ``close()`` ends the thread."""

    _iterator: Iterator[T] | None = None

    @abstractmethod
    def _items(self) -> tuple[Iterator[T], int]:
        """Return what follows the present position, and how many items are prepared ahead."""

    @abstractmethod
    def _advance(self, item: T) -> Batch:
        """Move the position behind an item, and return its batch."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            items, depth = self._items()
            self._iterator = PrefetchIterator(items, depth=depth) if depth else items
        return self._advance(next(self._iterator))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the thread. The next batch starts another: no batch is lost."""
        iterator, self._iterator = self._iterator, None
        if isinstance(iterator, PrefetchIterator):
            iterator.close()


class Loader(PrefetchedBatches[PositionedBatch]):
    """Iterates over one replica's batches."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        tokenizer: Tokenizer,
        mixture: MixtureConfig,
        config: LoaderConfig,
        seed: int,
        replica: DataReplica = _SINGLE_REPLICA,
    ) -> None:
        """Raises ConfigError or DataError where config, shards and tokenizer do not match."""
        if not 0 <= replica.rank < replica.num_replicas:
            raise ConfigError([f"rank {replica.rank} is not one of {replica.num_replicas} ranks"])
        self.languages = tokenizer.languages
        mixed = Mixture(mixture, shards=shards, languages=tokenizer.languages, seed=seed)
        self.tasks = mixed.task_names
        self._stream = BatchStream(shards, tokenizer=tokenizer, mixture=mixed, config=config)
        self._replica = replica
        self._fingerprint = _fingerprint(shards, mixture=mixture, config=config, seed=seed)
        self._seek(self._stream.initial_position())

    def state(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON."""
        position = self._position
        return {
            "format": STATE_FORMAT,
            "fingerprint": self._fingerprint,
            "first": position.first_draw,
            "batch": position.batch_index,
            "counts": position.counts.tolist(),
            "skipped": position.skipped.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at ``state``, on any number of ranks.

        Raises CheckpointError if the corpus, tokenizer, mixture, seed or loader settings differ.
        """
        found = state.get("fingerprint", self._fingerprint)  # checkpoints of format 1 have none
        if state.get("format") != STATE_FORMAT or found != self._fingerprint:
            raise CheckpointError(
                "the saved data position is of another corpus, tokenizer, mixture, seed or "
                f"loader config (found {str(found)[:8]}, expected "
                f"{self._fingerprint[:8]}); continue with the config it was saved with"
            )
        data = json.dumps(state).encode()
        where = "the saved data position"
        shape = parse_shape(data, _PositionShape, kind=_PositionShape.kind, where=where)
        if problem := shape.problem(len(self._counts)):
            raise CheckpointError(f"{where}: {problem}")
        self.close()
        arrays = (np.array(values, dtype=np.int64) for values in (shape.counts, shape.skipped))
        self._seek(LoaderPosition(shape.first, shape.batch, *arrays))

    def frequencies(self) -> list[StreamFrequency]:
        """Return the expected and actual frequency of each stream so far."""
        return self._stream.mixture.frequencies(self._counts)

    @property
    def labels(self) -> dict[str, Sequence[str]]:
        """The names of the values of each label in ``Batch.groups``."""
        found: dict[str, Sequence[str]] = {TASK: self.tasks}
        found |= dict.fromkeys((SOURCE_LANGUAGE, TARGET_LANGUAGE), self.languages)
        names = [name or "no domain" for name in self._stream.domains]
        return found | ({DOMAIN: names} if names else {})

    @property
    def num_draws(self) -> int:
        """Rows drawn so far, of all directions, with those over the length limits."""
        return int(self._counts.sum())

    @property
    def skipped(self) -> dict[str, int]:
        """Rows over the length limits so far, by direction."""
        found: dict[str, int] = {}
        for stream, count in zip(self._stream.mixture.streams, self._skipped, strict=True):
            name = f"{stream.source_language}-{stream.target_language}"
            if count:
                found[name] = found.get(name, 0) + int(count)
        return found

    def final_notes(self) -> list[str]:
        """Return a sentence on rows that were too long to train on, if there were any."""
        skipped, config = self.skipped, self._stream.config
        if not skipped:
            return []
        most = sorted(skipped.items(), key=lambda item: -item[1])[:4]
        directions = ", ".join(f"{direction} {count:,}" for direction, count in most)
        limits = f"data.loader.max_source={config.max_source}, max_target={config.max_target}"
        total, drawn = sum(skipped.values()), self.num_draws
        return [
            f"{total:,} of {drawn:,} rows drawn ({100 * total / max(1, drawn):.1f} %) were over "
            f"{limits} tokens and left out: {directions}"
        ]

    def held_out_batches(self, split: str = "valid", *, rows: int | None = None) -> Iterator[Batch]:
        """Yield this replica's part of a held-out split: the same in every call.

        At most ``rows`` rows of each task and direction are used, chosen by hash; the noise of
        denoising is the same in every call too.
        """
        return self._stream.held_out_batches(split, rows=rows, replica=self._replica)

    def _items(self) -> tuple[Iterator[PositionedBatch], int]:
        batches = self._stream.batches_from(self._position, replica=self._replica)
        return batches, self._stream.config.prefetch

    def _advance(self, item: PositionedBatch) -> Batch:
        self._position = item.next_position
        self._counts, self._skipped = item.counts, item.skipped
        return item.batch

    def _seek(self, position: LoaderPosition) -> None:
        self._position = position
        self._counts, self._skipped = position.counts, position.skipped


class _PositionShape(FileShape):
    kind: ClassVar[FileKind] = FileKind(
        name="data position", max_bytes=256 * MIB, error=CheckpointError
    )
    first: int = Field(ge=0, le=MAX_DRAWS)
    batch: int = Field(ge=0, le=MAX_DRAWS)
    counts: list[Annotated[int, Field(ge=0, le=MAX_DRAWS)]]
    skipped: list[Annotated[int, Field(ge=0, le=MAX_DRAWS)]]

    def problem(self, streams: int) -> str:
        """Return what contradicts itself, or the mixture of ``streams`` streams, or nothing."""
        if len(self.counts) != streams or len(self.skipped) != streams:
            found = f"{len(self.counts)} counts and {len(self.skipped)} of skipped rows"
            return f"found {found}, expected one for each of {streams} streams"
        if sum(self.counts) != self.first:
            return f"found {sum(self.counts)} draws by stream, expected first = {self.first}"
        if any(skipped > drawn for skipped, drawn in zip(self.skipped, self.counts, strict=True)):
            return "found more skipped rows than rows drawn"
        return ""


def _fingerprint(
    shards: TokenShards, *, mixture: MixtureConfig, config: LoaderConfig, seed: int
) -> str:
    # prefetching does not change batches
    parts = [shards.fingerprint, mixture.to_dict(), config.replace(prefetch=0).to_dict(), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
