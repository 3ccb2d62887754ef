"""Keyed texts: texts of a file in one language, paired with their translations by key."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.corpus.languages import ENGLISH
from moesaic.corpus.pair import Pair, RejectedPair

DISAGREE = "disagree"  # the reason of rejected pairs
_NUMBER = re.compile(r"\d{2,}")  # a single digit may be spelled out


@dataclass(frozen=True, slots=True)
class KeyedText:
    """A text under its key; ``invariants`` must be equal on both sides of a pair."""

    key: str
    text: str
    invariants: tuple[str, ...] = ()


def pair_by_key(
    source: KeyedText,
    target: KeyedText,
    *,
    code: str,
    origin: str,
    licence: str,
    compare_numbers: bool = False,
) -> Pair | RejectedPair:
    """Return the pair, rejected when ``invariants`` (or, optionally, numbers) differ.

    A message that is rewritten without its translation keeps its key: differing inline elements,
    variants or numbers are the sign.
    """
    differ = source.invariants != target.invariants or (
        compare_numbers and _numbers(source.text) != _numbers(target.text)
    )
    if differ and source.text != target.text:
        return RejectedPair(ENGLISH, code, DISAGREE)
    return Pair(source.text, target.text, ENGLISH, code, origin, licence)


def merge_first_wins(*sides: Mapping[str, KeyedText]) -> dict[str, KeyedText]:
    """Merge the texts of several files; the first file with a key wins."""
    joined: dict[str, KeyedText] = {}
    for side in reversed(sides):
        joined |= side
    return joined


def _numbers(text: str) -> list[str]:
    """Return the numbers of a text, in any script's digits, sorted, without separators."""
    found = _NUMBER.findall(text)
    return sorted("".join(str(unicodedata.digit(d)) for d in number) for number in found)
