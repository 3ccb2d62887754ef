"""Text rules: the normalisation that all text passes, to train on, to translate and to score alike.

``normalise_text`` is for text of every kind. What is true of software strings only (HTML entities,
tags, marks of keyboard accelerators, placeholders) is a choice of the corpus: ``TextRules``. A run
records the rules of its corpus in ``text_rules.json``; ``read_text_rules`` reads them back.
"""

import re
import unicodedata
from abc import abstractmethod
from pathlib import Path
from typing import Literal

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError, DataError
from moesaic.core.file_reader import KIB, FileKind, read_json
from moesaic.core.files import write_json
from moesaic.corpus.markup import (
    may_hold_accelerator,
    strip_accelerators,
    strip_tags,
    unescape_entities,
)
from moesaic.corpus.placeholders import placeholder_keys, without_placeholders

_REPLACEMENT = 0xFFFD
_CONTINUED = "x"  # stands for what follows a beginning
_MAX_PASSES = 8
# removed: soft hyphen, byte-order mark, word joiner, controls that are not white space
_REMOVED = dict.fromkeys(
    [0xAD, 0xFEFF, 0x2060, *(c for c in (*range(32), *range(0x7F, 0xA0)) if not chr(c).isspace())]
)
_NONCHARACTERS = dict.fromkeys(
    [
        *range(0xFDD0, 0xFDF0),
        *(plane + low for plane in range(0, 0x110000, 0x10000) for low in (0xFFFE, 0xFFFF)),
    ]
)
_LONE_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT)
_LINE_END = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_TABLE = _REMOVED | _NONCHARACTERS | _LONE_SURROGATES
# Thai, Lao, Tibetan, Burmese, Khmer and Javanese write no spaces: there U+200B divides words
_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\ua980-\ua9df\uaa60-\uaa7f"
_ZERO_WIDTH_SPACES = re.compile("\u200b+")
_STRAY_ZERO_WIDTH_SPACE = re.compile(f"(?<![{_UNSPACED}])\u200b|\u200b(?![{_UNSPACED}])")
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")
# characters of other categories without a glyph: fillers, joiners, variation selectors
_BLANKS = frozenset(
    map(
        chr,
        [
            *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
            *(*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)),
        ],
    )
)


def normalise_text(text: str) -> str:
    """Return the text in NFC, on one line, without control characters; empty if nothing is visible.

    White space of any kind (line ends, U+0085, U+2028, U+2029, no-break spaces) becomes single
    spaces. Soft hyphens, U+FEFF, U+2060 and noncharacters are removed; U+200B too, except between
    letters of scripts without spaces. ZWJ, ZWNJ, marks of direction and emoji sequences are kept. A
    lone surrogate becomes U+FFFD. Applied twice, it changes nothing more.
    """
    if not text.isprintable():
        text = text.translate(_TABLE)
    text = " ".join(text.split())
    if text.isascii():
        return text
    if "\u200b" in text:
        text = _ZERO_WIDTH_SPACES.sub("\u200b", text)
        text = " ".join(_STRAY_ZERO_WIDTH_SPACE.sub("", text).split())
    return unicodedata.normalize("NFC", text) if any(map(_is_visible, text)) else ""


def normalise_document(text: str) -> str:
    """Return a text of several lines in NFC, its lines and indentation kept; empty if invisible.

    Line ends of any kind become LF; white space at the end of a line, empty lines at both ends of
    the text, and control characters other than tabs are removed. A lone surrogate becomes U+FFFD.
    Applied twice, it changes nothing more.
    """
    lines = (line.translate(_TABLE).rstrip() for line in _LINE_END.split(text))
    plain = "\n".join(lines)
    plain = plain if plain.isascii() else unicodedata.normalize("NFC", plain)
    return plain.strip("\n") if any(map(_is_visible, plain)) else ""


def _is_visible(char: str) -> bool:
    return unicodedata.category(char) not in _INVISIBLE_CATEGORIES and char not in _BLANKS


class TextRules(Choice):
    """Family: what a corpus does to its texts before anything else reads them.

    ``GeneralText``, ``SoftwareStrings`` or ``DocumentText``. A model is given text by the rules of
    its corpus.
    """

    @abstractmethod
    def normalise(self, text: str, *, other: str | None = None) -> str:
        """Return the text as the corpus has it.

        ``other`` is the raw other side of a pair; None for a text alone: to translate or to score,
        or text in one language. A text that a corpus holds already is not changed.
        """

    def normalise_beginning(self, text: str) -> str:
        """Return the beginning of a text, which a model continues, as the corpus would have it."""
        return self.normalise(text)

    @abstractmethod
    def placeholders(self, text: str) -> tuple[str, ...]:
        """Return the keys of the placeholders that both sides of a pair must have, sorted."""

    @abstractmethod
    def without_placeholders(self, text: str) -> str:
        """Return the text with a space in place of each placeholder."""


class GeneralText(TextRules):
    """Text of any kind: ``normalise_text`` and nothing else; ``&``, ``_`` and ``<`` are text."""

    def normalise(self, text: str, *, other: str | None = None) -> str:  # noqa: ARG002
        return normalise_text(text)

    def placeholders(self, text: str) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def without_placeholders(self, text: str) -> str:
        return text


class DocumentText(TextRules):
    """Documents: ``normalise_document``, which keeps lines and indentation, and nothing else."""

    def normalise(self, text: str, *, other: str | None = None) -> str:  # noqa: ARG002
        return normalise_document(text)

    def normalise_beginning(self, text: str) -> str:
        # white space at the end of a text is removed, within it is kept
        return normalise_document(text + _CONTINUED)[: -len(_CONTINUED)]

    def placeholders(self, text: str) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def without_placeholders(self, text: str) -> str:
        return text


class SoftwareStrings(TextRules):
    """Strings of programs: entities are decoded, marks of accelerators removed.

    Both sides of a pair must have the same placeholders. ``tags`` are removed or kept; a model with
    copy units (``tokenizer.copy_units``) copies those that are kept. In a text alone, a mark within
    a word is kept: only the other side says whether ``file_name`` is an identifier or ``Sa_ve`` a
    menu entry; and where tags are kept, so are its entities.
    """

    tags: Literal["strip", "keep"] = "strip"

    def normalise(self, text: str, *, other: str | None = None) -> str:
        found = self._normalise_once(text, other=other)
        # a decoded entity may begin a tag, or hide a second one; a row of a corpus passes the rules
        # again when it is translated, and has to stay as the model was trained on it
        for _ in range(_MAX_PASSES):
            if not may_hold_accelerator(found) and "<" not in found:
                break
            before, found = found, self._normalise_once(found, other=None)
            if found == before:
                break
        return found

    def _normalise_once(self, text: str, *, other: str | None) -> str:
        plain = text
        if self.tags == "strip":
            plain = unescape_entities(strip_tags(unescape_entities(text)))
        elif other is not None:
            plain = unescape_entities(text)
        plain = normalise_text(plain)
        if not may_hold_accelerator(plain):
            return plain
        opposite = normalise_text(text if other is None else other)
        return normalise_text(strip_accelerators(plain, other=opposite))

    def placeholders(self, text: str) -> tuple[str, ...]:
        return placeholder_keys(text)

    def without_placeholders(self, text: str) -> str:
        return without_placeholders(text)


TEXT_RULES_FILE = FileKind(name="record of text rules", max_bytes=64 * KIB, error=DataError)


def write_text_rules(path: Path, rules: TextRules) -> None:
    """Record the text rules of a run's corpus."""
    write_json(path, rules.to_dict())


def read_text_rules(path: Path) -> TextRules:
    """Return the recorded rules; ``SoftwareStrings`` where a run has no record.

    Versions that made no record had no other rules. Raises DataError: a damaged record.
    """
    if not path.exists():
        return SoftwareStrings()
    try:
        return TextRules.from_dict(read_json(path, TEXT_RULES_FILE))
    except ConfigError as error:
        expected = 'expected the text rules of a run, as {"kind": "GeneralText"}'
        raise DataError(f"{path}: cannot be read: {error}; {expected}") from error
