"""Directions: which (source, target) languages a translation task has, as a value one chooses.

A pair of a corpus can be read either way round; two languages that share a third can be joined.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import DataError
from moesaic.data.shards import PairRows, TokenShards

LanguagePair = tuple[str, str]


class Directions(Choice):
    """See the module's first lines."""

    def language_pairs(self, shards: TokenShards) -> list[LanguagePair]:
        """Return (source, target) codes, in an order that does not depend on the machine."""
        raise NotImplementedError

    def rows(self, shards: TokenShards, pair: LanguagePair, *, split: str) -> PairRows:
        """Return the rows of one of ``names``."""
        return shards.pair_rows(*pair, split=split)


class FromEnglish(Directions):
    """English to every language that has pairs with it."""

    def language_pairs(self, shards: TokenShards) -> list[LanguagePair]:
        return [pair for pair in _both_directions(shards.directions) if pair[0] == "eng_Latn"]


class ToEnglish(Directions):
    """Every language that has pairs with English, to English."""

    def language_pairs(self, shards: TokenShards) -> list[LanguagePair]:
        return [pair for pair in _both_directions(shards.directions) if pair[1] == "eng_Latn"]


class StoredDirections(Directions):
    """The directions of the corpus as they are."""

    def language_pairs(self, shards: TokenShards) -> list[LanguagePair]:
        return sorted(shards.directions)


class BothDirections(Directions):
    """Every direction of the corpus and its reverse."""

    def language_pairs(self, shards: TokenShards) -> list[LanguagePair]:
        return _both_directions(shards.directions)


class ListedDirections(Directions):
    """The directions listed, e.g. ``["eng_Latn-deu_Latn", "fra_Latn-eng_Latn"]``."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1)]

    def language_pairs(self, shards: TokenShards) -> list[LanguagePair]:
        known = set(_both_directions(shards.directions))
        found = []
        for text in self.pairs:
            source, dash, target = text.partition("-")
            if not dash or (source, target) not in known:
                shards.pair_rows(source, target)  # raises, naming the nearest direction
                raise DataError(f'"{text}" is not a direction: expected e.g. eng_Latn-deu_Latn')
            found.append((source, target))
        return found


class PivotDirections(Directions):
    """Every pair of languages that share texts of ``pivot``, neither of them the pivot.

    The pairs are joined through the shared text and held in memory, 8 bytes each.
    """

    pivot: str = "eng_Latn"
    languages: Annotated[tuple[str, ...], Field(description="only between these; empty: all")] = ()

    def language_pairs(self, shards: TokenShards) -> list[LanguagePair]:
        ends = sorted(t for s, t in _both_directions(shards.directions) if s == self.pivot)
        chosen = [e for e in ends if not self.languages or e in self.languages]
        return [(s, t) for s in chosen for t in chosen if s != t]

    def rows(self, shards: TokenShards, pair: LanguagePair, *, split: str) -> PairRows:
        return shards.pivot_rows(*pair, pivot=self.pivot, split=split)


def _both_directions(directions: Iterable[LanguagePair]) -> list[LanguagePair]:
    return sorted(set(_with_reverse(directions)))


def _with_reverse(directions: Iterable[LanguagePair]) -> Iterator[LanguagePair]:
    for source, target in directions:
        yield source, target
        yield target, source
