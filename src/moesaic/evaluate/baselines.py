"""Translation baselines: copying the source, and a translation memory.

The memory returns the target of the training source that is most similar to the query, by cosine
similarity of tf-idf vectors of character 1- to 4-grams. The search is exact; the tests compare it
with a dense matrix product.

Letters: N training sources, Q queries, G buckets of n-grams, P postings (n-gram, source).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moesaic.core.errors import DataError

NGRAM_ORDERS = (1, 2, 3, 4)
NGRAM_BUCKETS = 1 << 22  # n-grams are hashed: collisions are rarer than one posting in a thousand
_CHUNK_SIZE = 20_000  # sources counted at a time: bounds the working memory
# an n-gram in more of the sources than this is common: see TranslationMemory
_COMMON_FRACTION = 1 / 8
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HASH_SHIFT = np.uint64(64 - 22)


def copy_source(texts: list[str], *, source: str, target: str) -> list[str]:  # noqa: ARG001
    """Return the source texts: the lower baseline, and a high one for software strings."""
    return list(texts)


@dataclass(frozen=True, slots=True)
class MemoryMatch:
    """The most similar stored pair; ``similarity`` in 0..1 is that of its source to the query."""

    target: str
    similarity: float
    index: int


class TranslationMemory:
    """Nearest training source by character n-grams; ties go to the earlier one.

    Scoring every source by every common n-gram would be slow. So all sources are scored by the rare
    n-grams first; the common ones together add at most
    ``|query's common part| * |source's common part|`` (Cauchy-Schwarz), and only sources whose
    bound reaches the best score are scored in full. The result is exact.
    """

    def __init__(self, sources: Sequence[str], *, targets: Sequence[str]) -> None:
        if len(sources) != len(targets):
            raise DataError(f"a memory of {len(sources)} sources and {len(targets)} targets")
        if not sources:
            raise DataError("a translation memory needs at least one training pair, found none")
        self._targets = targets
        counts = _count_ngrams(sources)
        documents = np.bincount(counts.gram, minlength=NGRAM_BUCKETS)
        self._idf = np.log((2 + len(sources)) / (1 + documents)).astype(np.float32)
        weight = counts.times * self._idf[counts.gram]
        # every row has a posting: a space is added on either side of a text
        self._start = np.concatenate([[0], np.cumsum(np.bincount(counts.row))])
        norm = np.sqrt(np.add.reduceat(weight * weight, self._start[:-1]))
        weight /= np.maximum(norm, 1e-9)[counts.row]
        self._gram, self._weight = counts.gram, weight
        self._common = documents > max(16, len(sources) * _COMMON_FRACTION)
        rare = ~self._common[counts.gram]
        squares = np.where(rare, np.float32(0), weight * weight)
        self._common_norm = np.sqrt(np.add.reduceat(squares, self._start[:-1]))
        place = np.flatnonzero(rare)
        keys = (counts.gram[place].astype(np.int64) << 32) | place
        keys.sort()
        place = keys & 0xFFFFFFFF
        self._posting_row, self._posting_weight = counts.row[place], weight[place]
        self._posting_end = np.cumsum(np.bincount(keys >> 32, minlength=NGRAM_BUCKETS))

    def __len__(self) -> int:
        return len(self._targets)

    def find(self, texts: Sequence[str]) -> list[MemoryMatch]:
        """Return the best match of every text; an empty one if no n-gram is shared."""
        found = []
        query = np.zeros(NGRAM_BUCKETS, dtype=np.float32)
        for gram, times in _count_ngrams(texts).rows() if texts else ():
            weight = times * self._idf[gram]
            norm = float(np.sqrt((weight.astype(np.float64) ** 2).sum()))
            query[gram] = weight / np.float32(max(norm, 1e-9))
            best, similarity = self._nearest(query, gram)
            query[gram] = 0.0
            target = self._targets[best] if similarity > 0 else ""
            found.append(MemoryMatch(target, min(similarity, 1.0), best))
        return found

    def _nearest(self, query: np.ndarray, gram: np.ndarray) -> tuple[int, float]:
        weight = query[gram]
        rare = ~self._common[gram]
        votes = self._score_rare_ngrams(gram[rare], weight[rare])
        bound = votes + self._common_norm * np.sqrt((weight[~rare].astype(np.float64) ** 2).sum())
        # Score the sources of the highest bounds, then all whose bound reaches the best of these.
        few = np.argpartition(-bound, min(32, len(bound) - 1))[:32]
        floor = self._score_all_ngrams(few, query).max()
        rows = np.flatnonzero(bound >= floor - 1e-5)
        scores = self._score_all_ngrams(rows, query)
        best = int(np.argmax(scores >= scores.max() - 1e-6))
        return int(rows[best]), float(scores[best])

    def _score_rare_ngrams(self, gram: np.ndarray, weight: np.ndarray) -> np.ndarray:
        ends = self._posting_end[gram]
        starts = np.where(gram > 0, self._posting_end[gram - 1], 0)
        at = _concatenate_ranges(starts, ends - starts)
        shares = np.repeat(weight, ends - starts) * self._posting_weight[at]
        return np.bincount(self._posting_row[at], weights=shares, minlength=len(self))

    def _score_all_ngrams(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        lengths = self._start[rows + 1] - self._start[rows]
        at = _concatenate_ranges(self._start[rows], lengths)
        shares = query[self._gram[at]] * self._weight[at]
        return np.bincount(np.repeat(np.arange(len(rows)), lengths), shares, minlength=len(rows))


class TranslationMemorySystem:
    """A translation memory per direction, built at the first request for a direction.

    ``pairs(source, target)`` yields the training pairs of a direction. One memory is cached at a
    time: evaluate one direction after the other.
    """

    def __init__(self, pairs: Callable[[str, str], Iterator[tuple[str, str]]]) -> None:
        self._pairs = pairs
        self._direction: tuple[str, str] | None = None
        self._memory: TranslationMemory | None = None

    def __call__(self, texts: list[str], *, source: str, target: str) -> list[str]:
        """Return the best targets; empty ones for a direction without training pairs."""
        if self._direction != (source, target):
            rows = list(self._pairs(source, target))
            targets = [t for _, t in rows]
            self._memory = (
                TranslationMemory([s for s, _ in rows], targets=targets) if rows else None
            )
            self._direction = (source, target)
        if self._memory is None:
            return [""] * len(texts)
        return [match.target for match in self._memory.find(texts)]


@dataclass(frozen=True, slots=True)
class _NgramCounts:
    """N-gram counts of texts: int32 rows and buckets sorted by (row, bucket), float32 counts."""

    row: np.ndarray
    gram: np.ndarray
    times: np.ndarray
    num_rows: int

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        edges = np.searchsorted(self.row, np.arange(self.num_rows + 1))
        for start, end in pairwise(edges):
            yield self.gram[start:end], self.times[start:end]


def _count_ngrams(texts: Sequence[str]) -> _NgramCounts:
    parts = [
        _count_ngrams_of_chunk(texts[start : start + _CHUNK_SIZE], start)
        for start in range(0, len(texts), _CHUNK_SIZE)
    ]
    columns = [np.concatenate([part[i] for part in parts]) for i in range(3)]
    return _NgramCounts(columns[0], columns[1], columns[2], len(texts))


def _count_ngrams_of_chunk(
    texts: Sequence[str], first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hash all n-grams of all texts at once, in one array of characters; spaces around each."""
    padded = [f" {' '.join(text.casefold().split())} " for text in texts]
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    row = np.repeat(np.arange(len(texts), dtype=np.uint64), [len(p) for p in padded])
    keys, rolling = [], np.zeros(len(letters), dtype=np.uint64)
    for order in range(1, max(NGRAM_ORDERS) + 1):
        ends = len(letters) - order + 1
        if ends <= 0:
            break
        rolling = (rolling[:ends] + letters[order - 1 :] + np.uint64(1)) * _HASH_MULTIPLIER
        rolling ^= rolling >> np.uint64(29)
        if order in NGRAM_ORDERS:
            inside = row[:ends] == row[order - 1 :]
            keys.append((row[:ends][inside] << np.uint64(22)) | (rolling[inside] >> _HASH_SHIFT))
    both, times = np.unique(np.concatenate(keys), return_counts=True)
    gram = (both & np.uint64(NGRAM_BUCKETS - 1)).astype(np.int32)
    return (both >> np.uint64(22)).astype(np.int32) + first, gram, times.astype(np.float32)


def _concatenate_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate ``arange(start, start + length)`` of every range."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
