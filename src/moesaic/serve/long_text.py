"""Long text: what is done with a text of more tokens than a model reads at once.

``SplitSentences`` translates it in parts and joins them; ``Truncate`` translates its beginning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from moesaic.core.config import Choice
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.placeholders import find_placeholders
from moesaic.serve.sentence_splitting import (
    clause_ends,
    ends_inside_a_word,
    middle,
    sentence_ends,
    word_ends,
)

Boundary = Literal["sentence", "clause", "word", "inside"]
CountTokens = Callable[[Sequence[str]], list[int]]  # texts -> tokens of each

# scripts that write no space after a sentence, and scripts that write none between words
_NO_SPACES = ("Hans", "Hant", "Jpan")
_NO_WORD_SPACES = (*_NO_SPACES, "Thai", "Laoo", "Khmr", "Mymr", "Tibt")


@dataclass(frozen=True, slots=True)
class TextPart:
    """A part of a text, and what kind of boundary ends it (``inside``: of a word)."""

    text: str
    boundary: Boundary = "sentence"


class LongText(Choice):
    """Family: how a text over the limit is read."""

    def parts(self, text: str, *, limit: int, count: CountTokens) -> list[TextPart]:
        """Return the parts to translate, in order. One of more than ``limit`` tokens is cut off."""
        raise NotImplementedError


class Truncate(LongText):
    """Only the beginning is translated."""

    def parts(self, text: str, *, limit: int, count: CountTokens) -> list[TextPart]:  # noqa: ARG002
        return [TextPart(text)]


class SplitSentences(LongText):
    """Every sentence is a part; one that is too long is cut at clauses, words, or in the middle.

    Below the sentence, parts are as long as the limit allows, so that few cuts are made.
    """

    def parts(self, text: str, *, limit: int, count: CountTokens) -> list[TextPart]:
        parts = [TextPart(text)]
        for level in (_SENTENCES, _CLAUSES, _WORDS):
            parts = _split_long(parts, level, limit=limit, count=count)
        while True:
            halves = _split_long(parts, _HALVES, limit=limit, count=count)
            if len(halves) == len(parts):
                return parts
            parts = halves


def join_translations(texts: Sequence[str], *, parts: Sequence[TextPart], target: str) -> str:
    """Join the translations of the parts of a text, as the ``target`` language separates them."""
    script = resolve_language(target).script
    joined = texts[0]
    for text, before in zip(texts[1:], parts, strict=False):
        joined += (_separator(before.boundary, script) if joined and text else "") + text
    return joined


def _separator(boundary: Boundary, script: str) -> str:
    unspaced = _NO_WORD_SPACES if boundary == "word" else _NO_SPACES
    return "" if boundary == "inside" or script in unspaced else " "


@dataclass(frozen=True, slots=True)
class _Level:
    """Where a text can be cut; ``packs``: neighbours stay together while they are within limits."""

    boundary: Boundary
    ends: Callable[[str], list[int]]
    packs: bool = True


_SENTENCES = _Level("sentence", sentence_ends, packs=False)
_CLAUSES, _WORDS = _Level("clause", clause_ends), _Level("word", word_ends)
_HALVES = _Level("inside", middle, packs=False)


def _split_long(
    parts: Sequence[TextPart], level: _Level, *, limit: int, count: CountTokens
) -> list[TextPart]:
    """Split the parts over the limit; what ends each of them stays."""
    result: list[TextPart] = []
    for part, tokens in zip(parts, count([p.text for p in parts]), strict=True):
        pieces = [part.text]
        if tokens > limit:
            ends = _outside_placeholders(part.text, level.ends(part.text))
            pieces = _slices(
                part.text, _packed(part.text, ends, limit, count) if level.packs else ends
            )
        for piece in pieces[:-1]:
            # between two letters of a script without spaces, a cut is one between words
            whole = level.boundary == "inside" and not ends_inside_a_word(piece)
            result.append(TextPart(piece, "word" if whole else level.boundary))
        result.append(TextPart(pieces[-1], part.boundary))
    return result


def _outside_placeholders(text: str, ends: list[int]) -> list[int]:
    """Leave out ends within a placeholder, tag or URL: its halves would be translated as text."""
    found = iter(find_placeholders(text))
    span = next(found, None)
    kept = []
    for end in ends:
        while span is not None and span.end <= end:
            span = next(found, None)
        if span is None or end <= span.start:
            kept.append(end)
    return kept


def _packed(text: str, ends: list[int], limit: int, count: CountTokens) -> list[int]:
    """Leave out ends so that neighbours are one part while their tokens are within the limit."""
    edges = [0, *ends, len(text)]
    tokens = count([text[a:b] for a, b in pairwise(edges)])
    kept, used = [], 0
    for start, size in zip(edges, tokens, strict=False):
        if start and used + size > limit:
            kept.append(start)
            used = 0
        used += size
    return kept


def _slices(text: str, ends: Sequence[int]) -> list[str]:
    edges = [0, *ends, len(text)]
    found = [text[a:b].strip(" \u200b") for a, b in pairwise(edges)]
    return [part for part in found if part] or [text]
