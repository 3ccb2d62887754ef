"""Cleaning: normalisation of texts, and the named rules that drop pairs.

Rules and thresholds follow measurements on software catalogues: short strings, many placeholders,
some left in English. Every dropped pair is counted under its rule's name.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from pydantic import Field

from moesaic.core.config import Config
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.markup import (
    may_hold_accelerator,
    strip_accelerators,
    strip_tags,
    unescape_entities,
)
from moesaic.corpus.pair import Pair
from moesaic.corpus.placeholders import placeholder_keys, without_placeholders
from moesaic.corpus.scripts import (
    count_letters,
    count_script,
    count_visible,
    is_known_script,
    script_classes,
)

# characters of English per character of the script, for the length ratio
_LENGTH_FACTOR = {"Hans": 2.2, "Hant": 2.2, "Jpan": 1.9, "Hang": 1.6}
_INVISIBLE = dict.fromkeys(
    [0xAD, 0xFEFF, *(c for c in (*range(32), *range(0x7F, 0xA0)) if not chr(c).isspace())]
)
_SLACK = 12  # characters, added to both lengths: short texts vary most ("OK")


class CleaningConfig(Config):
    """Thresholds of the cleaning rules: fractions, and lengths in characters."""

    max_characters: int = Field(default=600, gt=0)
    min_letters: float = Field(default=0.5, ge=0, le=1)
    max_length_ratio: float = Field(default=3.0, ge=1)
    min_script: float = Field(default=0.5, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class NormalisedSide:
    """A normalised side of a pair and the counts that rules need, without its placeholders."""

    text: str
    plain: str
    script: str
    letters: int
    visible: int
    in_script: int
    placeholders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NormalisedPair:
    """Both sides of a pair, ready for the rules."""

    source: NormalisedSide
    target: NormalisedSide


@dataclass(frozen=True, slots=True)
class CleaningRule:
    """A named rule: the pair is dropped where ``rejects`` is true. ``why`` explains it to users."""

    name: str
    why: str
    rejects: Callable[[NormalisedPair, CleaningConfig], bool]


def normalise_text(text: str, *, other: str = "") -> str:
    """Decode entities, remove tags and accelerators, collapse white space, normalise to NFC.

    ``other`` is the raw other side of the pair: see ``strip_accelerators``.
    """
    text = strip_accelerators(unescape_entities(strip_tags(unescape_entities(text))), other=other)
    if not text.isprintable():
        text = text.translate(_INVISIBLE)
    text = " ".join(text.split())
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class PairCleaner:
    """Normalises pairs, and drops those that a rule rejects."""

    def __init__(self, config: CleaningConfig) -> None:
        self.config = config
        self._scripts: dict[str, str] = {}

    def clean(self, pair: Pair) -> tuple[Pair | None, str]:
        """Return the normalised pair and ``""``, or None and the name of the rejecting rule."""
        normalised = NormalisedPair(
            self._normalise_source(pair.source, code=pair.source_language, other=pair.target),
            _normalise_side(pair.target, self._script(pair.target_language), pair.source),
        )
        for rule in CLEANING_RULES:
            if rule.rejects(normalised, self.config):
                return None, rule.name
        return replace(pair, source=normalised.source.text, target=normalised.target.text), ""

    def _normalise_source(self, text: str, *, code: str, other: str) -> NormalisedSide:
        script = self._script(code)
        if may_hold_accelerator(text):
            return _normalise_side(text, script, other)
        return _normalise_side_cached(text, script, "")

    def _script(self, code: str) -> str:
        if code not in self._scripts:
            self._scripts[code] = resolve_language(code).script
        return self._scripts[code]


def _normalise_side(raw: str, script: str, other: str) -> NormalisedSide:
    text = normalise_text(raw, other=other)
    plain = without_placeholders(text)
    seen = script_classes(plain)
    return NormalisedSide(
        text,
        plain,
        script,
        count_letters(seen),
        count_visible(seen),
        count_script(seen, script=script),
        placeholder_keys(text),
    )


# a source recurs in every language, and in the next package of the same program
_normalise_side_cached = lru_cache(maxsize=1 << 16)(_normalise_side)


def _has_few_letters(pair: NormalisedPair, config: CleaningConfig) -> bool:
    return any(
        side.letters == 0 or side.letters < config.min_letters * side.visible
        for side in (pair.source, pair.target)
    )


def _differs_in_length(pair: NormalisedPair, config: CleaningConfig) -> bool:
    source, target = (
        len(side.text) * _LENGTH_FACTOR.get(side.script, 1.0) + _SLACK
        for side in (pair.source, pair.target)
    )
    return max(source, target) > config.max_length_ratio * min(source, target)


def _fits_script(side: NormalisedSide, *, other: NormalisedSide, config: CleaningConfig) -> bool:
    """Whether a side is in its script; words that it shares with the other side do not count."""
    if side.in_script >= config.min_script * side.letters or not is_known_script(side.script):
        return True
    words = set(other.plain.split())
    classes = script_classes(" ".join(w for w in side.plain.split() if w not in words))
    letters = count_letters(classes)
    return letters > 0 and count_script(classes, script=side.script) >= config.min_script * letters


CLEANING_RULES: tuple[CleaningRule, ...] = (
    CleaningRule(
        "empty",
        "a side is empty once markup is removed",
        lambda pair, _: not (pair.source.text and pair.target.text),
    ),
    CleaningRule(
        "too_long",
        "a side is longer than max_characters",
        lambda pair, config: (
            max(len(pair.source.text), len(pair.target.text)) > config.max_characters
        ),
    ),
    CleaningRule(
        "broken",
        "a side contains U+FFFD: it was decoded wrongly",
        lambda pair, _: "\ufffd" in pair.source.text + pair.target.text,
    ),
    CleaningRule(
        "untranslated",
        "both sides are the same",
        lambda pair, _: pair.source.text.casefold() == pair.target.text.casefold(),
    ),
    CleaningRule("few_letters", "less than min_letters of a side are letters", _has_few_letters),
    CleaningRule(
        "length_ratio",
        "the sides differ in length by more than max_length_ratio",
        _differs_in_length,
    ),
    CleaningRule(
        "placeholders",
        "the sides do not have the same placeholders, tags, URLs and e-mail addresses",
        lambda pair, _: pair.source.placeholders != pair.target.placeholders,
    ),
    CleaningRule(
        "script",
        "a side is not written in its language's script",
        lambda pair, config: (
            not (
                _fits_script(pair.source, other=pair.target, config=config)
                and _fits_script(pair.target, other=pair.source, config=config)
            )
        ),
    ),
)
