"""Loader: an endless iterator of batches that stops and continues at the exact next one.

Every rank makes its own part of the same global batches; the union over ranks is the same for any
number of them, so a run may resume on another number of ranks.

Background: an iterator moved to a thread that works a few items ahead.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.data.batch import Batch
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

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class PrefetchIterator(Generic[T]):
    """Items of ``source`` in order, made up to ``ahead`` early; its errors are raised here.

    The thread is a daemon and ends at ``close()``, which waits for it.
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
        if self._failure or self._stop.is_set():  # an iterator that has ended stays ended
            raise self._failure.error if self._failure else StopIteration
        item = self._queue.get()
        if isinstance(item, _Failure):
            self._failure = item
            raise item.error
        return item

    def close(self) -> None:
        """End the thread; items made early are lost. May be called twice."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
            self._put(_Failure(StopIteration()))
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(_Failure(error))

    def _put(self, item: T | _Failure) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False


__all__ = ["DataReplica", "Loader", "LoaderConfig"]
STATE_FORMAT = 1
_SINGLE_REPLICA = DataReplica()


class Loader:
    """See the module's first lines. ``with`` or ``close()`` ends its thread."""

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
        """Raises ConfigError or DataError where the parts do not fit together."""
        self._iterator: Iterator[PositionedBatch] | None = None
        if not 0 <= replica.rank < replica.num_replicas:
            raise ConfigError([f"rank {replica.rank} is not one of {replica.num_replicas} ranks"])
        self.languages = tokenizer.languages
        mixed = Mixture(mixture, shards=shards, languages=tokenizer.languages, seed=seed)
        self.tasks = mixed.task_names
        self._stream = BatchStream(shards, tokenizer=tokenizer, mixture=mixed, config=config)
        self._replica = replica
        self._fingerprint = _fingerprint(shards, mixture=mixture, config=config, seed=seed)
        self._seek(self._stream.initial_position())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start_iterator()
        handed = next(self._iterator)
        self._position, self._drawn = (
            handed.next_position,
            _DrawCounts(handed.counts, handed.skipped),
        )
        return handed.batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the thread. The next batch asked for starts another: nothing is lost."""
        ahead, self._iterator = self._iterator, None
        if isinstance(ahead, PrefetchIterator):
            ahead.close()

    def state(self) -> dict[str, Any]:
        """Return the place of the next batch not yet handed out, as JSON holds it."""
        at = self._position
        return {
            "format": STATE_FORMAT,
            "fingerprint": self._fingerprint,
            "first": at.first_draw,
            "batch": at.batch_index,
            "counts": at.counts.tolist(),
            "skipped": at.skipped.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, on any number of ranks.

        Raises CheckpointError if the corpus, tokenizer, mixture, seed or loader settings differ.
        """
        found = state.get("fingerprint", self._fingerprint)  # checkpoints of format 1 have none
        if state.get("format") != STATE_FORMAT or found != self._fingerprint:
            raise CheckpointError(
                "the saved place in the data is of another corpus, tokenizer, mixture, seed or "
                f"loader config (found {found[:8]}, expected "
                f"{self._fingerprint[:8]}); continue with the config it was saved with"
            )
        self.close()
        arrays = (np.array(state[name], dtype=np.int64) for name in ("counts", "skipped"))
        self._seek(LoaderPosition(int(state["first"]), int(state["batch"]), *arrays))

    def frequencies(self) -> list[StreamFrequency]:
        """Return a line per stream: its weight, and the frequency drawn so far."""
        return self._stream.mixture.frequencies(self._drawn.counts)

    @property
    def skipped(self) -> dict[str, int]:
        """Rows left out because they are over the length limits, by direction."""
        found: dict[str, int] = {}
        for stream, count in zip(self._stream.mixture.streams, self._drawn.skipped, strict=True):
            name = f"{stream.source_language}-{stream.target_language}"
            if count:
                found[name] = found.get(name, 0) + int(count)
        return found

    def held_out_batches(self, split: str = "valid", *, rows: int | None = None) -> Iterator[Batch]:
        """Yield this rank's part of a held-out split once; every call yields the same.

        At most ``rows`` rows are taken of each task and direction, chosen by hash; the noise of
        denoising is the same in every call too.
        """
        return self._stream.held_out_batches(split, rows=rows, replica=self._replica)

    def _start_iterator(self) -> Iterator[PositionedBatch]:
        made = self._stream.batches_from(self._position, replica=self._replica)
        ahead = self._stream.config.prefetch
        return PrefetchIterator(made, depth=ahead) if ahead else made

    def _seek(self, position: LoaderPosition) -> None:
        self._position = position
        self._drawn = _DrawCounts(position.counts, position.skipped)


@dataclass(frozen=True, slots=True)
class _DrawCounts:
    counts: np.ndarray
    skipped: np.ndarray


def _fingerprint(
    shards: TokenShards, *, mixture: MixtureConfig, config: LoaderConfig, seed: int
) -> str:
    # the thread decides when batches are made, never which
    parts = [shards.fingerprint, mixture.to_dict(), config.replace(prefetch=0).to_dict(), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
