"""The data mixture: the stream and row of the n-th sample of a run, over tasks and languages.

Each task gets a share of the samples by its weight, each of its streams ``size^(1/temperature)`` of
that. The stream of draw n is a function of (seed, n) alone: n times the golden ratio, modulo 1, is
in the stream's interval (a low-discrepancy sequence), so that after any number of draws every
stream is within a few draws of its exact share. A stream takes a new permutation of its rows in
every epoch; the only state is one counter per stream. Letters: N draws, M streams.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from moesaic.core.config import Choice, Config
from moesaic.core.errors import ConfigError, DataError, did_you_mean, listed
from moesaic.data.numpy_counter_rng import GOLDEN_RATIO_64, random_bits, random_permutation
from moesaic.data.ragged import IntArray
from moesaic.data.tasks import Task, TaskStream, Translation
from moesaic.data.token_shards import TokenShards

_OFFSET, _EPOCH = 11, 12


class StreamSize(Choice):
    """The unit of a stream's size."""

    def size(self, stream: TaskStream) -> float:
        raise NotImplementedError


class RowCount(StreamSize):
    """Number of pairs or texts."""

    def size(self, stream: TaskStream) -> float:
        return float(stream.rows.size)


class TokenCount(StreamSize):
    """Number of tokens of the target side."""

    def size(self, stream: TaskStream) -> float:
        return float(stream.rows.num_tokens)


class WeightedTask(Config):
    """A task and its weight: its share of the rows is weight / sum of weights."""

    task: Task
    weight: float = Field(default=1.0, gt=0)


class MixtureConfig(Config):
    """The tasks of a run, and the sampling weights of tasks and languages."""

    tasks: tuple[WeightedTask, ...] = Field(
        default=(WeightedTask(task=Translation()),), min_length=1
    )
    temperature: float = Field(default=1.0, ge=1)
    """1: proportional to size; 5: NLLB-like; large: uniform over streams."""

    size_unit: StreamSize = RowCount()
    size_limit: int | None = Field(default=None, ge=1)
    """A size counts as at most this (T5's limit, arXiv:1910.10683)."""

    language_weights: dict[str, float] = Field(
        default_factory=dict, description="language code -> factor on its weight"
    )


@dataclass(frozen=True, slots=True)
class SampleDraws:
    """Draws [N]: their numbers in the run, each a ``row`` of a ``stream``."""

    number: IntArray
    stream: IntArray
    row: IntArray

    def __len__(self) -> int:
        return self.number.shape[0]

    def first(self, count: int) -> "SampleDraws":
        """Return the first draws."""
        return SampleDraws(self.number[:count], self.stream[:count], self.row[:count])


@dataclass(frozen=True, slots=True)
class StreamFrequency:
    """Expected and actual frequency of a stream."""

    task: str
    source_language: str
    target_language: str
    size: int
    expected: float
    drawn: int
    actual: float
    domain: str = ""


class Mixture:
    """The streams of a config over shards, and their weights. All state is in ``counts``."""

    def __init__(
        self, config: MixtureConfig, *, shards: TokenShards, languages: Sequence[str], seed: int
    ) -> None:
        _check_language_weights(config, languages)
        self.seed = seed
        self.tasks = tuple(weighted.task for weighted in config.tasks)
        self.task_names = _unique_names([task.name for task in self.tasks])
        streams, stream_task, weights = [], [], []
        for t, weighted in enumerate(config.tasks):
            found = weighted.task.streams(shards, languages=languages, split="train")
            found = [stream for stream in found if stream.size]
            if not found:
                known = listed(f"{s}-{t}" for s, t in shards.directions)
                raise DataError(
                    f"task {self.task_names[t]} has no training rows in the languages "
                    f"{', '.join(languages)}; the shards have the directions {known}"
                )
            powers = np.array([_stream_weight(stream, config) for stream in found])
            weights.append(weighted.weight * powers / powers.sum())
            streams += found
            stream_task += [t] * len(found)
        self.streams: tuple[TaskStream, ...] = tuple(streams)
        self.stream_task = np.array(stream_task, dtype=np.int64)
        joint = np.concatenate(weights)
        self.weights = joint / joint.sum()
        self._sizes = np.array([stream.size for stream in streams], dtype=np.int64)
        # 2^64 times the cumulative weights; the last interval ends at 2^64
        ends = np.minimum(np.cumsum(self.weights)[:-1] * 2.0**64, 2.0**64 - 2048)
        self._ends = ends.astype(np.uint64)

    def initial_counts(self) -> IntArray:
        """Return the counts [M] before the first draw."""
        return np.zeros(len(self.streams), dtype=np.int64)

    def stream_of_draws(self, number: IntArray) -> IntArray:
        """Return the stream [N] of draws, given their numbers [N]."""
        with np.errstate(over="ignore"):
            point = random_bits(self.seed, _OFFSET) + number.astype(np.uint64) * GOLDEN_RATIO_64
        return np.searchsorted(self._ends, point, side="right")

    def draw(self, first: int, *, count: int, counts: IntArray) -> SampleDraws:
        """Return draws ``first`` to ``first + count``; ``counts`` [M] are draws before them."""
        number = np.arange(first, first + count)
        stream = self.stream_of_draws(number)
        order = np.argsort(stream, kind="stable")
        fresh = np.bincount(stream, minlength=len(self.streams))
        earlier = np.empty_like(order)  # draws of the same stream before this one, in the window
        earlier[order] = np.arange(count) - np.repeat(np.cumsum(fresh) - fresh, fresh)
        nth, size = counts[stream] + earlier, self._sizes[stream]
        key = random_bits(self.seed, _EPOCH, stream, nth // size)
        return SampleDraws(number, stream, random_permutation(nth % size, size=size, key=key))

    def counts_after(self, draws: SampleDraws, *, counts: IntArray) -> IntArray:
        """Return the counts [M] after ``draws``."""
        return counts + np.bincount(draws.stream, minlength=len(self.streams))

    def frequencies(self, counts: IntArray) -> list[StreamFrequency]:
        """Return the table of expected and actual frequencies after ``counts`` draws."""
        total = max(1, int(counts.sum()))
        return [
            StreamFrequency(
                task=self.task_names[self.stream_task[m]],
                source_language=stream.source_language,
                target_language=stream.target_language,
                size=stream.size,
                expected=float(self.weights[m]),
                drawn=int(counts[m]),
                actual=int(counts[m]) / total,
                domain=stream.domain,
            )
            for m, stream in enumerate(self.streams)
        ]


def _stream_weight(stream: TaskStream, config: MixtureConfig) -> float:
    size = config.size_unit.size(stream)
    size = min(size, config.size_limit) if config.size_limit else size
    codes = {stream.source_language, stream.target_language}
    return max(size, 1.0) ** (1 / config.temperature) * float(
        np.prod([config.language_weights.get(code, 1.0) for code in sorted(codes)])
    )


def _check_language_weights(config: MixtureConfig, languages: Sequence[str]) -> None:
    for code, factor in config.language_weights.items():
        if code not in languages:
            hint = did_you_mean(code, languages)
            raise ConfigError(
                [f"data.mixture.language_weights.{code}: not a language of this run{hint}"]
            )
        if not factor > 0:
            raise ConfigError(
                [f"data.mixture.language_weights.{code}: found {factor}, expected more than 0"]
            )


def _unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Number repeated names: ``translation, translation-2``."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return tuple(found)
