"""Cleaning: what is done to a text, and the named rules that a pair must pass.

Recipe and thresholds follow what was measured on software catalogues: short strings, many
placeholders, some left in English. Every rejection is counted under its rule's name.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from moesaic.core.config import Config
from moesaic.data.languages import language
from moesaic.data.markup import (
    placeholders,
    strip_accelerators,
    strip_tags,
    unescape,
    without_placeholders,
)
from moesaic.data.pair import Pair
from moesaic.data.scripts import classes, count_letters, count_script, count_visible, is_known

# characters of English per character of the script, for the length ratio
_DENSITY = {"Hans": 2.2, "Hant": 2.2, "Jpan": 1.9, "Hang": 1.6}
_INVISIBLE = dict.fromkeys(
    [0xAD, 0xFEFF, *(c for c in (*range(32), *range(0x7F, 0xA0)) if not chr(c).isspace())]
)
_SLACK = 12  # characters: "OK" may well become a word five times as long


class Clean(Config):
    """Thresholds of the rules. Shares are of 1, lengths in characters."""

    max_characters: int = Field(default=600, gt=0)
    min_letters: float = Field(default=0.5, ge=0, le=1)
    max_length_ratio: float = Field(default=3.0, ge=1)
    min_script: float = Field(default=0.5, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A normalised pair and what the rules look at: placeholders out, characters classified."""

    source: str
    target: str
    source_script: str
    target_script: str
    source_plain: str
    target_plain: str
    source_classes: str
    target_classes: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A named reason to drop a pair."""

    name: str
    why: str
    rejects: Callable[[Prepared, Clean], bool]


def normalise(text: str, *, other: str = "") -> str:
    """Entities decoded, tags and accelerators out, white space single, NFC.

    ``other`` is the raw other side of the pair: see ``strip_accelerators``.
    """
    text = strip_accelerators(unescape(strip_tags(unescape(text))), other=other)
    text = " ".join(text.split())
    if not text.isprintable():
        text = text.translate(_INVISIBLE)
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Cleaner:
    """Normalises pairs and says which rule, if any, drops them."""

    def __init__(self, config: Clean) -> None:
        self.config = config
        self._scripts: dict[str, str] = {}

    def clean(self, pair: Pair) -> tuple[Pair | None, str]:
        """Return the normalised pair and ``""``, or None and the name of the rule that drops it."""
        source = normalise(pair.source, other=pair.target)
        target = normalise(pair.target, other=pair.source)
        prepared = self._prepare(pair, source=source, target=target)
        for rule in RULES:
            if rule.rejects(prepared, self.config):
                return None, rule.name
        return (
            Pair(
                source,
                target,
                pair.source_language,
                pair.target_language,
                pair.origin,
                pair.licence,
            ),
            "",
        )

    def _prepare(self, pair: Pair, *, source: str, target: str) -> Prepared:
        source_plain, target_plain = without_placeholders(source), without_placeholders(target)
        return Prepared(
            source,
            target,
            self._script(pair.source_language),
            self._script(pair.target_language),
            source_plain,
            target_plain,
            classes(source_plain),
            classes(target_plain),
        )

    def _script(self, code: str) -> str:
        if code not in self._scripts:
            self._scripts[code] = language(code).script
        return self._scripts[code]


def _is_empty(pair: Prepared, _: Clean) -> bool:
    return not pair.source or not pair.target


def _is_long(pair: Prepared, config: Clean) -> bool:
    return max(len(pair.source), len(pair.target)) > config.max_characters


def _is_broken(pair: Prepared, _: Clean) -> bool:
    return "\ufffd" in pair.source or "\ufffd" in pair.target


def _is_untranslated(pair: Prepared, _: Clean) -> bool:
    return pair.source == pair.target or pair.source.casefold() == pair.target.casefold()


def _has_few_letters(pair: Prepared, config: Clean) -> bool:
    for seen in (pair.source_classes, pair.target_classes):
        letters = count_letters(seen)
        if letters == 0 or letters < config.min_letters * count_visible(seen):
            return True
    return False


def _differs_in_length(pair: Prepared, config: Clean) -> bool:
    source = len(pair.source) * _DENSITY.get(pair.source_script, 1.0) + _SLACK
    target = len(pair.target) * _DENSITY.get(pair.target_script, 1.0) + _SLACK
    return max(source, target) > config.max_length_ratio * min(source, target)


def _differs_in_placeholders(pair: Prepared, _: Clean) -> bool:
    return placeholders(pair.source) != placeholders(pair.target)


def _is_in_another_script(pair: Prepared, config: Clean) -> bool:
    return not (
        _fits(pair.source_classes, pair.source_plain, pair.target_plain, pair.source_script, config)
        and _fits(
            pair.target_classes, pair.target_plain, pair.source_plain, pair.target_script, config
        )
    )


def _fits(seen: str, text: str, other: str, script: str, config: Clean) -> bool:
    """Names kept from the other side (URL, Django) do not count against the script."""
    if not is_known(script):
        return True
    if count_script(seen, script=script) >= config.min_script * count_letters(seen):
        return True
    words = set(other.split())
    own = classes(" ".join(w for w in text.split() if w not in words))
    letters = count_letters(own)
    return letters > 0 and count_script(own, script=script) >= config.min_script * letters


RULES: tuple[Rule, ...] = (
    Rule("empty", "a side is empty once markup is gone", _is_empty),
    Rule("too_long", "a side is longer than max_characters", _is_long),
    Rule("broken", "a side holds U+FFFD: it was decoded wrongly", _is_broken),
    Rule("untranslated", "both sides are the same", _is_untranslated),
    Rule("few_letters", "less than min_letters of a side are letters", _has_few_letters),
    Rule(
        "length_ratio",
        "the sides differ in length by more than max_length_ratio",
        _differs_in_length,
    ),
    Rule("placeholders", "the sides do not hold the same placeholders", _differs_in_placeholders),
    Rule("script", "a side is not written in its language's script", _is_in_another_script),
)
