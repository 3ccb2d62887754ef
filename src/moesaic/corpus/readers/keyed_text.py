"""Keyed: one text of a file that holds one language, under the key that its translations share.

Matched: two texts under one key, as a pair, unless the two sides visibly disagree.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.corpus.languages import ENGLISH
from moesaic.corpus.pair import Pair, RejectedPair


@dataclass(frozen=True, slots=True)
class KeyedText:
    """``marks`` is what two sides under one key should have in common beside the text."""

    key: str
    text: str
    invariants: tuple[str, ...] = ()


DISAGREE = "disagree"


_NUMBER = re.compile(r"\d{2,}")  # a single digit may well become a word


def pair_by_key(
    source: KeyedText,
    target: KeyedText,
    *,
    code: str,
    origin: str,
    licence: str,
    compare_numbers: bool = False,
) -> Pair | RejectedPair:
    """Return the pair, or Unfit when marks (or, where asked for, numbers) differ.

    A page or message that was rewritten while its translation stayed keeps its key: then inline
    elements, variants or the numbers in it tell.
    """
    differ = source.invariants != target.invariants or (
        compare_numbers and _numbers(source.text) != _numbers(target.text)
    )
    if differ and source.text != target.text:
        return RejectedPair(ENGLISH, code, DISAGREE)
    return Pair(source.text, target.text, ENGLISH, code, origin, licence)


def merge_first_wins(*sides: Mapping[str, KeyedText]) -> dict[str, KeyedText]:
    """Join several files' texts; the first that has a key wins."""
    joined: dict[str, KeyedText] = {}
    for side in reversed(sides):
        joined |= side
    return joined


def _numbers(text: str) -> list[str]:
    """The numbers of a text, in any script's digits, order and separators ignored."""
    found = _NUMBER.findall(text)
    return sorted("".join(str(unicodedata.digit(d)) for d in number) for number in found)
