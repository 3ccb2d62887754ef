"""Directions: which (source, target) languages a translation task has, as a value one chooses.

A pair of a corpus can be read either way round; two languages that share a third can be joined.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import DataError
from moesaic.data.shards import PairRows, Shards

Pair = tuple[str, str]


class Directions(Choice):
    """See the module's first lines."""

    def names(self, shards: Shards) -> list[Pair]:
        """Return (source, target) codes, in an order that does not depend on the machine."""
        raise NotImplementedError

    def rows(self, shards: Shards, pair: Pair, *, split: str) -> PairRows:
        """Return the rows of one of ``names``."""
        return shards.pair_rows(*pair, split=split)


class FromEnglish(Directions):
    """English to every language that has pairs with it."""

    def names(self, shards: Shards) -> list[Pair]:
        return [pair for pair in _both(shards.directions) if pair[0] == "eng_Latn"]


class ToEnglish(Directions):
    """Every language that has pairs with English, to English."""

    def names(self, shards: Shards) -> list[Pair]:
        return [pair for pair in _both(shards.directions) if pair[1] == "eng_Latn"]


class AsStored(Directions):
    """The directions of the corpus as they are."""

    def names(self, shards: Shards) -> list[Pair]:
        return sorted(shards.directions)


class BothWays(Directions):
    """Every direction of the corpus and its reverse."""

    def names(self, shards: Shards) -> list[Pair]:
        return _both(shards.directions)


class Only(Directions):
    """The directions listed, e.g. ``["eng_Latn-deu_Latn", "fra_Latn-eng_Latn"]``."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1)]

    def names(self, shards: Shards) -> list[Pair]:
        known = set(_both(shards.directions))
        found = []
        for text in self.pairs:
            source, dash, target = text.partition("-")
            if not dash or (source, target) not in known:
                shards.pair_rows(source, target)  # raises, naming the nearest direction
                raise DataError(f'"{text}" is not a direction: expected e.g. eng_Latn-deu_Latn')
            found.append((source, target))
        return found


class Joined(Directions):
    """Every pair of languages that share texts of ``pivot``, neither of them the pivot.

    The pairs are joined through the shared text and held in memory, 8 bytes each.
    """

    pivot: str = "eng_Latn"
    languages: Annotated[tuple[str, ...], Field(description="only between these; empty: all")] = ()

    def names(self, shards: Shards) -> list[Pair]:
        ends = sorted(t for s, t in _both(shards.directions) if s == self.pivot)
        chosen = [e for e in ends if not self.languages or e in self.languages]
        return [(s, t) for s in chosen for t in chosen if s != t]

    def rows(self, shards: Shards, pair: Pair, *, split: str) -> PairRows:
        return shards.joined_rows(*pair, pivot=self.pivot, split=split)


def _both(directions: Iterable[Pair]) -> list[Pair]:
    return sorted(set(_each_way(directions)))


def _each_way(directions: Iterable[Pair]) -> Iterator[Pair]:
    for source, target in directions:
        yield source, target
        yield target, source
