"""The batch stream: from a position in a run's data to the batches that follow it, for one replica.

A window of consecutive draws is planned from lengths alone, the same on every rank: rows of similar
length form batches (length bucketing). A rank then reads and pads only its own rows.

Letters: N draws of a window, M streams, B rows of a batch. The area of a batch is rows * (longest
source + longest target).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError, DataError
from moesaic.corpus.split import SPLITS
from moesaic.data.batch import Batch
from moesaic.data.collators import Collator, EncoderDecoderCollator, RowLengths, TokenizedSamples
from moesaic.data.document_packing import DocumentPieces, gather_documents
from moesaic.data.language_tag import SOURCE_TAG, TARGET_TAG, TASK_PREFIX, TASK_TAG
from moesaic.data.mixture import Mixture, SampleDraws
from moesaic.data.numpy_counter_rng import random_bits, random_permutation
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.row_plan import DrawnTexts, RowPlan, first_rows_of_each, plan_rows
from moesaic.data.tasks import TaskStream
from moesaic.data.token_shards import TokenShards
from moesaic.data.tokenizer import Tokenizer

# streams of random bits
_NOISE, _TIE_BREAK, _ORDER, _HELD_OUT = 21, 22, 23, 24
_MAX_EMPTY_WINDOWS = 100


def bucket_by_length(lengths: RowLengths, *, batch_tokens: int, key: IntArray) -> list[IntArray]:
    """Return the rows of each batch: of similar length, with no area over ``batch_tokens``.

    ``key[N]`` breaks ties, so that rows of equal length are not grouped by stream. The number of
    batches is that of greedy filling; their areas are then as equal as that number allows, so that
    the last batch of a window is not a small remainder.
    """
    source, target = lengths
    # by the longer side first: it dominates the area
    order = np.lexsort((key, source, np.maximum(source, target)))
    source, target = source[order], target[order]
    ends = _batch_ends(source, target, batch_tokens)
    low, high = batch_tokens // 2, batch_tokens
    while high - low > max(1, batch_tokens // 64):
        middle = (low + high) // 2
        found = _batch_ends(source, target, middle)
        low, high = (low, middle) if len(found) == len(ends) else (middle, high)
        ends = found if len(found) == len(ends) else ends
    return np.split(order, ends[:-1]) if ends else []


def rows_of_rank(rows: IntArray, *, rank: int, num_replicas: int) -> IntArray:
    """Return one replica's rows of a batch whose rows are in order of length.

    Assigned in a zigzag (0 1 2 2 1 0), so that no replica gets only the longer ones; each row goes
    to exactly one replica, and their numbers of rows differ by at most one.
    """
    phase = np.arange(len(rows)) % (2 * num_replicas)
    return rows[np.minimum(phase, 2 * num_replicas - 1 - phase) == rank]


def _batch_ends(source: IntArray, target: IntArray, budget: int) -> list[int]:
    """Return the end of each batch when batches are filled greedily up to ``budget``."""
    ends, first = [], 0
    while first < len(source):
        most = max(1, budget // max(1, int(source[first] + target[first])))
        rows = slice(first, first + most)
        widest = np.maximum.accumulate(source[rows]) + np.maximum.accumulate(target[rows])
        area = widest * np.arange(1, len(widest) + 1)
        first += max(1, int(np.searchsorted(area, budget, side="right")))
        ends.append(first)
    return ends


class LoaderConfig(Config):
    """Batch size and limits. Lengths and areas are in tokens, special tokens included."""

    batch_tokens: int = Field(default=4096, ge=8)
    """Largest rows * (longest source + longest target), over all ranks."""

    bucket_window: int = Field(default=16384, ge=1)
    """Draws that are bucketed by length together."""

    max_source: int = Field(default=256, ge=2)
    """Rows with a longer source are skipped and counted."""

    max_target: int = Field(default=256, ge=2)
    """Rows with a longer target are skipped and counted."""

    collator: Collator = EncoderDecoderCollator()
    prefetch: int = Field(default=16, ge=0)
    """Batches prepared in advance by a thread; 0: no thread."""


@dataclass(frozen=True, slots=True)
class DataReplica:
    """A data-parallel rank. The content of global batches does not depend on their number."""

    rank: int = 0
    num_replicas: int = 1


@dataclass(frozen=True, slots=True)
class LoaderPosition:
    """A position in a run's data: a batch of the window that starts at ``first_draw``.

    ``counts`` and ``skipped`` [M] are the draws, and over-long rows among them, before the window.
    """

    first_draw: int
    batch_index: int
    counts: IntArray
    skipped: IntArray


@dataclass(frozen=True, slots=True)
class PlannedWindow:
    """A planned window: streams, text ids and lengths of its rows [R], and its batches."""

    stream: IntArray
    source: IntArray
    target: IntArray
    key: IntArray
    lengths: RowLengths
    pieces: DocumentPieces
    batches: tuple[IntArray, ...]
    skipped: IntArray


@dataclass(frozen=True, slots=True)
class PositionedBatch:
    """A batch, the position after it, and the draws and skips up to the end of its window."""

    batch: Batch
    next_position: LoaderPosition
    counts: IntArray
    skipped: IntArray


class BatchStream:
    """Yields a replica's batches from any position. All state is in ``LoaderPosition``."""

    def __init__(
        self, shards: TokenShards, *, tokenizer: Tokenizer, mixture: Mixture, config: LoaderConfig
    ) -> None:
        _check_limits(shards, tokenizer=tokenizer, config=config)
        self.shards, self.mixture, self.config = shards, mixture, config
        self._tokenizer = tokenizer
        self.domains = _domains(shards, languages=tokenizer.languages)
        self._packed_stream = _largest_packed_stream(mixture)

    def initial_position(self) -> LoaderPosition:
        counts = self.mixture.initial_counts()
        return LoaderPosition(0, 0, counts, counts)

    def batches_from(
        self, position: LoaderPosition, *, replica: DataReplica
    ) -> Iterator[PositionedBatch]:
        """Yield this replica's part of every global batch from ``position`` on, without end.

        Raises DataError when all rows of many windows are over-long.
        """
        labels, empty = self._labels(self.mixture.streams, self.mixture.stream_task), 0
        while True:
            draws = self._draw_window(position)
            window = self._plan_window(draws, self.mixture.streams, self.mixture.stream_task)
            counts = self.mixture.counts_after(draws, counts=position.counts)
            skipped = position.skipped + window.skipped
            empty = 0 if window.batches else empty + 1
            if empty == _MAX_EMPTY_WINDOWS:
                raise DataError(self._nothing_fits_message(empty * self.config.bucket_window))
            for b in range(position.batch_index, len(window.batches)):
                batch = self._make_batch(window, b, labels=labels, replica=replica)
                yield PositionedBatch(batch, replace(position, batch_index=b + 1), counts, skipped)
            position = LoaderPosition(position.first_draw + len(draws), 0, counts, skipped)

    def held_out_batches(
        self, split: str, *, rows: int | None, replica: DataReplica
    ) -> Iterator[Batch]:
        """Yield this replica's part of every batch of a split: the same in every call.

        At most ``rows`` rows of a stream are used, chosen by hash. The order of lengths is mixed.
        """
        streams, task_of = [], []
        for t, task in enumerate(self.mixture.tasks):
            found = task.streams(self.shards, languages=self._tokenizer.languages, split=split)
            found = [stream for stream in found if stream.size]
            streams, task_of = streams + found, task_of + [t] * len(found)
        sizes = [min(s.size, rows or s.size) for s in streams]
        stream = np.repeat(np.arange(len(streams)), sizes)
        nth = Ragged.gather(
            np.arange(max(sizes, default=0)),
            starts=np.zeros(len(sizes)),
            lengths=np.array(sizes, dtype=np.int64),
        ).tokens
        size = np.array([s.size for s in streams], dtype=np.int64)[stream]
        index = random_permutation(nth, size=size, key=random_bits(_HELD_OUT, stream))
        draws = SampleDraws(random_bits(_HELD_OUT, stream, index), stream, index)
        window = self._plan_window(draws, streams, np.array(task_of, dtype=np.int64), most=rows)
        labels = self._labels(streams, np.array(task_of, dtype=np.int64))
        for b in range(len(window.batches)):
            yield self._make_batch(window, b, labels=labels, replica=replica)

    def _draw_window(self, position: LoaderPosition) -> SampleDraws:
        """Draw a window; it ends where the largest stream of packed documents begins anew.

        So the rows of two epochs of that stream are never mixed in one window.
        """
        draws = self.mixture.draw(
            position.first_draw, count=self.config.bucket_window, counts=position.counts
        )
        if self._packed_stream is None:
            return draws
        size = self.mixture.streams[self._packed_stream].size
        left = size - int(position.counts[self._packed_stream]) % size
        of_stream = np.flatnonzero(draws.stream == self._packed_stream)
        return draws.first(of_stream[left - 1] + 1) if len(of_stream) >= left else draws

    def _plan_window(
        self,
        draws: SampleDraws,
        streams: Sequence[TaskStream],
        task_of: IntArray,
        *,
        most: int | None = None,
    ) -> PlannedWindow:
        source, target = _text_ids(draws, streams)
        text = RowLengths(self.shards.lengths(source), self.shards.lengths(target))
        plan = plan_rows(
            DrawnTexts(draws.stream, task_of[draws.stream], source, target, text),
            tasks=self.mixture.tasks,
            collator=self.config.collator,
            window=self.config.max_target,
        )
        fits = plan.lengths.source <= self.config.max_source
        fits &= plan.lengths.target <= self.config.max_target
        over = np.bincount(draws.stream[plan.draw[~fits]], minlength=len(streams))
        plan = plan.select(np.flatnonzero(fits))
        if most is not None:
            plan = plan.select(first_rows_of_each(draws.stream[plan.draw], count=most))
        seed, number = self.mixture.seed, _row_numbers(draws, plan)
        key = random_bits(seed, _TIE_BREAK, number)
        batches = bucket_by_length(plan.lengths, batch_tokens=self.config.batch_tokens, key=key)
        first = draws.number[0] if len(draws) else 0
        order = np.argsort(random_bits(seed, _ORDER, first, np.arange(len(batches))))
        return PlannedWindow(
            stream=draws.stream[plan.draw],
            source=source[plan.draw],
            target=target[plan.draw],
            key=random_bits(seed, _NOISE, number),
            lengths=plan.lengths,
            pieces=plan.pieces,
            batches=tuple(batches[i] for i in order),
            skipped=over,
        )

    def _make_batch(
        self, window: PlannedWindow, number: int, *, labels: "_StreamLabels", replica: DataReplica
    ) -> Batch:
        global_rows = window.batches[number]
        rows = rows_of_rank(global_rows, rank=replica.rank, num_replicas=replica.num_replicas)
        # rows of a task are adjacent: each task makes its sources in one call
        rows = rows[np.argsort(labels.task[window.stream[rows]], kind="stable")]
        stream = window.stream[rows]
        task = labels.task[stream]
        vocabulary = self._tokenizer.vocabulary
        documents = gather_documents(self.shards, window.pieces.of_rows(rows), eos=vocabulary.eos)
        whole = np.ones(len(rows), dtype=np.int64)
        if documents is not None:
            whole[documents.rows] = 0
        texts, key = self._gather_whole(window.source[rows], whole), window.key[rows]
        edges = np.searchsorted(task, np.arange(len(self.mixture.tasks) + 1))
        source = Ragged.concatenate(
            [
                task_.corrupt_source(
                    texts.slice(start, stop),
                    key=key[start:stop],
                    vocabulary=vocabulary,
                )
                for task_, start, stop in zip(
                    self.mixture.tasks, edges[:-1].tolist(), edges[1:].tolist(), strict=True
                )
                if stop > start
            ]
        )
        samples = TokenizedSamples(
            source=source,
            target=self._gather_whole(window.target[rows], whole),
            task=task,
            source_language=labels.source_language[stream],
            target_language=labels.target_language[stream],
            tokens={name: tokens[stream] for name, tokens in labels.tokens.items()},
            key=key,
            documents=documents,
            domain=labels.domain[stream] if self.domains else None,
        )
        empty = RowLengths(window.lengths.source[global_rows], window.lengths.target[global_rows])
        return self.config.collator.collate(samples, vocabulary=vocabulary, empty=empty)

    def _gather_whole(self, texts: IntArray, whole: IntArray) -> Ragged:
        """Return the tokens of texts where ``whole`` [B] is 1, and none where it is 0."""
        lengths = self.shards.lengths(texts) * whole
        return self.shards.gather_parts(texts, first=np.zeros_like(texts), lengths=lengths)

    def _labels(self, streams: Sequence[TaskStream], task_of: IntArray) -> "_StreamLabels":
        index = {code: i for i, code in enumerate(self._tokenizer.languages)}
        ends = [(s.source_language, s.target_language) for s in streams]
        columns = np.array([(index[s], index[t]) for s, t in ends], dtype=np.int64).reshape(-1, 2)
        number = {domain: i for i, domain in enumerate(self.domains)}
        domain = np.array([number.get(s.domain, 0) for s in streams], dtype=np.int64)
        names, tag = self.config.collator.frame.names, self._tokenizer.vocabulary.tag
        tokens = {
            name: np.array([tag(pair[side]) for pair in ends], dtype=np.int64)
            for side, name in enumerate((SOURCE_TAG, TARGET_TAG))
            if name in names
        }
        if TASK_TAG in names:
            of_task = [tag(TASK_PREFIX + name) for name in self.mixture.task_names]
            tokens[TASK_TAG] = np.array(of_task, dtype=np.int64)[task_of]
        return _StreamLabels(task_of, domain, columns[:, 0], columns[:, 1], tokens)

    def _nothing_fits_message(self, draws: int) -> str:
        return (
            f"none of {draws} rows drawn fits data.loader.max_source={self.config.max_source} and "
            f"max_target={self.config.max_target}; raise them"
        )


@dataclass(frozen=True, slots=True)
class _StreamLabels:
    """Task, domain, languages and special tokens of each stream [M]."""

    task: IntArray
    domain: IntArray
    source_language: IntArray
    target_language: IntArray
    tokens: dict[str, IntArray]


def _domains(shards: TokenShards, *, languages: Sequence[str]) -> tuple[str, ...]:
    """Return the domains of all splits, sorted, with "" for texts without one; or none at all."""
    known = {
        domain
        for code in languages
        for split in SPLITS
        for domain in shards.domains(code, split=split)
    }
    return tuple(sorted({*known, ""})) if known - {""} else ()


def _largest_packed_stream(mixture: Mixture) -> int | None:
    """Return the stream of packed documents with the most tokens, if there is one."""
    none = np.zeros(0, dtype=np.int64)
    packed = [task.pieces(none, stream=none, window=1) is not None for task in mixture.tasks]
    found = [m for m, task in enumerate(mixture.stream_task.tolist()) if packed[task]]
    return max(found, key=lambda m: mixture.streams[m].rows.num_tokens, default=None)


def _row_numbers(draws: SampleDraws, plan: RowPlan) -> IntArray:
    """Return a number of each row [R]: of its draw, and of its beginning in a packed document."""
    number = draws.number[plan.draw]
    return np.where(plan.first > 0, random_bits(number, plan.first), number.astype(np.uint64))


def _text_ids(draws: SampleDraws, streams: Sequence[TaskStream]) -> tuple[IntArray, IntArray]:
    """Return the text ids [N] of both sides, one lookup per stream."""
    source, target = np.zeros((2, len(draws)), dtype=np.int64)
    order = np.argsort(draws.stream, kind="stable")
    present, starts = np.unique(draws.stream[order], return_index=True)
    for m, rows in zip(present, np.split(order, starts)[1:], strict=True):
        source[rows], target[rows] = streams[m].rows.text_ids(draws.row[rows])
    return source, target


def _check_limits(shards: TokenShards, *, tokenizer: Tokenizer, config: LoaderConfig) -> None:
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{shards.path} was written with another tokenizer (its fingerprint starts "
            f"{shards.tokenizer_fingerprint[:8]}, this one's {tokenizer.fingerprint[:8]}); "
            "write the shards again with this one"
        )
    zero = np.zeros(1, dtype=np.int64)
    has_encoder = config.collator.lengths(zero, target=zero).source[0] > 0
    longest = config.max_target + (config.max_source if has_encoder else 0)
    if longest > config.batch_tokens:
        raise ConfigError(
            [
                f"data.loader.batch_tokens: found {config.batch_tokens}, expected at least the "
                f"longest row that the limits allow, {longest}"
            ]
        )
