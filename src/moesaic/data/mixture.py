"""Mixture: which stream and row the n-th draw of a run is, over tasks and languages.

A task gets its weight's share of the draws, a stream within it ``size^(1/temperature)``. The stream
of draw n is a function of (seed, n) alone: n times the golden ratio, modulo 1, falls into the
stream's interval, so that after any number of draws every stream is within a few draws of its exact
share. A stream walks a new permutation of its rows in every epoch; the only state is one counter
per stream. Letters: N draws, M streams.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from moesaic.core.config import Choice, Config
from moesaic.core.errors import ConfigError, DataError, did_you_mean
from moesaic.data.numpy_counter_rng import GOLDEN_RATIO_64, random_bits, random_permutation
from moesaic.data.ragged import IntArray
from moesaic.data.tasks import Task, TaskStream, Translation
from moesaic.data.token_shards import TokenShards

_OFFSET, _EPOCH = 11, 12


class StreamSize(Choice):
    """What the size of a stream is counted in."""

    def size(self, stream: TaskStream) -> float:
        raise NotImplementedError


class RowCount(StreamSize):
    """Pairs or texts."""

    def size(self, stream: TaskStream) -> float:
        return float(stream.rows.size)


class TokenCount(StreamSize):
    """Tokens of the target side."""

    def size(self, stream: TaskStream) -> float:
        return float(stream.rows.num_tokens)


class WeightedTask(Config):
    """A task and its weight: the share of rows drawn is weight / sum of weights."""

    task: Task
    weight: Annotated[float, Field(gt=0)] = 1.0


class MixtureConfig(Config):
    """What is drawn how often."""

    tasks: tuple[WeightedTask, ...] = Field(
        default=(WeightedTask(task=Translation()),), min_length=1
    )
    temperature: Annotated[
        float,
        Field(ge=1, description="1: proportional to size; 5: NLLB-like; large: all streams alike"),
    ] = 1.0
    size_unit: StreamSize = RowCount()
    size_limit: Annotated[
        int | None,
        Field(ge=1, description="a size counts as at most this (T5's limit, arXiv:1910.10683)"),
    ] = None
    language_weights: dict[str, float] = Field(
        default_factory=dict, description="language code -> factor on its weight"
    )


@dataclass(frozen=True, slots=True)
class SampleDraws:
    """Draws by their number in the run [N], each a row ``index`` of a ``stream``."""

    number: IntArray
    stream: IntArray
    row: IntArray

    def __len__(self) -> int:
        return self.number.shape[0]


@dataclass(frozen=True, slots=True)
class StreamFrequency:
    """A line of the table of expected and actual frequencies."""

    task: str
    source_language: str
    target_language: str
    size: int
    expected: float
    drawn: int
    actual: float


class Mixture:
    """The streams of a config over shards, and their weights. Frozen; ``counts`` are the state."""

    def __init__(
        self, config: MixtureConfig, *, shards: TokenShards, languages: Sequence[str], seed: int
    ) -> None:
        _check_language_weights(config, languages)
        self.seed = seed
        self.tasks = tuple(weighted.task for weighted in config.tasks)
        self.task_names = _unique_names([task.name for task in self.tasks])
        streams, task_of, weights = [], [], []
        for t, weighted in enumerate(config.tasks):
            found = weighted.task.streams(shards, languages=languages, split="train")
            found = [stream for stream in found if stream.size]
            if not found:
                known = ", ".join(f"{s}-{t}" for s, t in shards.directions[:8])
                raise DataError(
                    f"task {self.task_names[t]} has no training rows in the languages "
                    f"{', '.join(languages)}; the shards have the directions {known}"
                )
            powers = np.array([_stream_weight(stream, config) for stream in found])
            weights.append(weighted.weight * powers / powers.sum())
            streams += found
            task_of += [t] * len(found)
        self.streams: tuple[TaskStream, ...] = tuple(streams)
        self.stream_task = np.array(task_of, dtype=np.int64)
        joint = np.concatenate(weights)
        self.weights = joint / joint.sum()
        self._sizes = np.array([stream.size for stream in streams], dtype=np.int64)
        # 2^64 times the cumulative weights; the last interval ends where the integers do
        ends = np.minimum(np.cumsum(self.weights)[:-1] * 2.0**64, 2.0**64 - 2048)
        self._ends = ends.astype(np.uint64)

    def initial_counts(self) -> IntArray:
        """Return the counts [M] of a run that has drawn nothing."""
        return np.zeros(len(self.streams), dtype=np.int64)

    def stream_of_draws(self, number: IntArray) -> IntArray:
        """Return the stream [N] of each draw, given the draws' numbers [N]."""
        with np.errstate(over="ignore"):
            point = random_bits(self.seed, _OFFSET) + number.astype(np.uint64) * GOLDEN_RATIO_64
        return np.searchsorted(self._ends, point, side="right")

    def draw(self, first: int, *, count: int, counts: IntArray) -> SampleDraws:
        """Return draws ``first`` to ``first + count``; ``counts`` [M] were drawn before them."""
        number = np.arange(first, first + count)
        stream = self.stream_of_draws(number)
        order = np.argsort(stream, kind="stable")
        fresh = np.bincount(stream, minlength=len(self.streams))
        earlier = np.empty_like(order)  # draws of the same stream before this one, in the window
        earlier[order] = np.arange(count) - np.repeat(np.cumsum(fresh) - fresh, fresh)
        turn, size = counts[stream] + earlier, self._sizes[stream]
        key = random_bits(self.seed, _EPOCH, stream, turn // size)
        return SampleDraws(number, stream, random_permutation(turn % size, size=size, key=key))

    def counts_after(self, draws: SampleDraws, *, counts: IntArray) -> IntArray:
        """Return the counts [M] once ``draws`` are made."""
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
                [f"mixture.language_weights.{code}: not a language of this run{hint}"]
            )
        if not factor > 0:
            raise ConfigError(
                [f"mixture.language_weights.{code}: found {factor}, expected more than 0"]
            )


def _unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """``translation, translation -> translation, translation-2``."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return tuple(found)
