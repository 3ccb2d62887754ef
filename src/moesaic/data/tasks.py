"""Tasks: what a model is asked to do with a text. A user's own joins the family by being defined.

A task says which streams of rows it reads, how long its rows can get, and what becomes of the
source. Letters: B rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.data.counter import UInt64Array, random_bits
from moesaic.data.directions import Directions, FromEnglish
from moesaic.data.noise import MaskTokens, DeleteTokens, InfillSpans, TextNoise, ShuffleTokens
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.shards import IndexedRows, TokenShards


@dataclass(frozen=True, slots=True)
class TaskStream:
    """The rows of one task in one direction; what a mixture mixes."""

    source_language: str
    target_language: str
    rows: IndexedRows

    @property
    def size(self) -> int:
        return self.rows.size


class Task(Choice):
    """What a model is asked to do. ``name`` is what metrics call it."""

    @property
    def name(self) -> str:
        raise NotImplementedError

    def streams(self, shards: TokenShards, *, languages: Sequence[str], split: str) -> list[TaskStream]:
        """Return the streams among ``languages``, empty ones included."""
        raise NotImplementedError

    def max_source_lengths(self, source: IntArray) -> IntArray:
        """Return an upper bound [B] of the source lengths after ``source_rows``."""
        return source

    def corrupt_source(self, rows: Ragged, *, key: UInt64Array) -> Ragged:
        """Return what the model reads for ``rows``; ``key[B]`` is the rows' own randomness."""
        raise NotImplementedError


class Translation(Task):
    """Say the target of a pair, given its source (one model, many directions: arXiv:1611.04558)."""

    directions: Directions = FromEnglish()

    @property
    def name(self) -> str:
        return "translation"

    def streams(self, shards: TokenShards, *, languages: Sequence[str], split: str) -> list[TaskStream]:
        pairs = [p for p in self.directions.language_pairs(shards) if set(p) <= set(languages)]
        return [TaskStream(*p, self.directions.rows(shards, p, split=split)) for p in pairs]

    def corrupt_source(self, rows: Ragged, *, key: UInt64Array) -> Ragged:  # noqa: ARG002
        return rows


class Denoising(Task):
    """Say a text, given a damaged copy of it (BART, arXiv:1910.13461).

    The default is the recipe of multitask multilingual translation (Wang et al. 2020,
    arXiv:2010.02523): infill spans, drop, blank, shuffle nearby. ``noise: [InfillSpans]`` alone is
    mBART's (arXiv:2001.08210).
    """

    noise: tuple[TextNoise, ...] = (InfillSpans(), DeleteTokens(), MaskTokens(), ShuffleTokens())
    languages: Annotated[tuple[str, ...], Field(description="only these; empty: all")] = ()

    @property
    def name(self) -> str:
        return "denoising"

    def streams(self, shards: TokenShards, *, languages: Sequence[str], split: str) -> list[TaskStream]:
        return _text_streams(shards, self.languages or languages, languages=languages, split=split)

    def corrupt_source(self, rows: Ragged, *, key: UInt64Array) -> Ragged:
        for step, noise in enumerate(self.noise):
            rows = noise(rows, key=random_bits(key, step))
        return rows


class CausalLM(Task):
    """Say a text, given nothing but its language."""

    languages: Annotated[tuple[str, ...], Field(description="only these; empty: all")] = ()

    @property
    def name(self) -> str:
        return "causal-lm"

    def streams(self, shards: TokenShards, *, languages: Sequence[str], split: str) -> list[TaskStream]:
        return _text_streams(shards, self.languages or languages, languages=languages, split=split)

    def max_source_lengths(self, source: IntArray) -> IntArray:
        return source * 0

    def corrupt_source(self, rows: Ragged, *, key: UInt64Array) -> Ragged:  # noqa: ARG002
        return Ragged.empty(len(rows))


def _text_streams(
    shards: TokenShards, chosen: Sequence[str], *, languages: Sequence[str], split: str
) -> list[TaskStream]:
    held = [code for code in sorted(chosen) if code in languages and code in shards.languages]
    return [TaskStream(code, code, shards.text_rows(code, split=split)) for code in held]
