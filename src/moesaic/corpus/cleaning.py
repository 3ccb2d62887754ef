"""Cleaning: the named rules that drop pairs once their sides are normalised (``text_rules.py``).

Rules and thresholds follow measurements on software catalogues: short strings, many placeholders,
some left in English. Every dropped pair is counted under its rule's name.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

from pydantic import Field, field_validator

from moesaic.core.config import Config
from moesaic.core.errors import did_you_mean
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.markup import may_hold_accelerator
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.scripts import (
    count_letters,
    count_script,
    count_visible,
    is_known_script,
    script_classes,
)
from moesaic.corpus.text_rules import GeneralText, TextRules

# characters of English per character of the script, for the length ratio
_LENGTH_FACTOR = {"Hans": 2.2, "Hant": 2.2, "Jpan": 1.9, "Hang": 1.6}
_SLACK = 12  # characters, added to both lengths: short texts vary most ("OK")
_ALWAYS = ("empty", "broken")  # such a row is of no use to anybody


class CleaningConfig(Config):
    """Text rules, and thresholds of the cleaning rules: fractions, and lengths in characters.

    The rules named in ``disabled_rules`` (``untranslated``, ``script``, ...) drop nothing.
    """

    text_rules: TextRules = GeneralText()
    max_characters: int = Field(default=600, gt=0)
    min_letters: float = Field(default=0.5, ge=0, le=1)
    max_length_ratio: float = Field(default=3.0, ge=1)
    min_script: float = Field(default=0.5, ge=0, le=1)
    disabled_rules: tuple[str, ...] = ()

    @field_validator("disabled_rules")
    @classmethod
    def _are_rules(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = [rule.name for rule in CLEANING_RULES if rule.name not in _ALWAYS]
        for name in names:
            if name not in known:
                raise ValueError(
                    f'"{name}" cannot be disabled: expected {", ".join(known)}'
                    f"{did_you_mean(name, known)}"
                )
        return names


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


class PairCleaner:
    """Normalises pairs, and drops those that a rule rejects."""

    def __init__(self, config: CleaningConfig) -> None:
        self.config = config
        self._rules = [rule for rule in CLEANING_RULES if rule.name not in config.disabled_rules]
        self._scripts: dict[str, str] = {}

    def clean(self, pair: Pair) -> tuple[Pair | None, str]:
        """Return the normalised pair and ``""``, or None and the name of the rejecting rule."""
        normalised = NormalisedPair(
            self._normalise_source(pair.source, code=pair.source_language, other=pair.target),
            _normalise_side(
                pair.target,
                self.config.text_rules,
                script=self._script(pair.target_language),
                other=pair.source,
            ),
        )
        for rule in self._rules:
            if rule.rejects(normalised, self.config):
                return None, rule.name
        return replace(pair, source=normalised.source.text, target=normalised.target.text), ""

    def clean_text(self, text: Text) -> tuple[Text | None, str]:
        """Return a normalised text in one language, or None and the name of the rejecting rule."""
        plain = self.config.text_rules.normalise(text.text)
        if not plain:
            return None, "empty"
        return (None, "broken") if "\ufffd" in plain else (replace(text, text=plain), "")

    def _normalise_source(self, text: str, *, code: str, other: str) -> NormalisedSide:
        rules, script = self.config.text_rules, self._script(code)
        if may_hold_accelerator(text):
            return _normalise_side(text, rules, script=script, other=other)
        return _normalise_side_cached(text, cast(Hashable, rules), script=script, other="")

    def _script(self, code: str) -> str:
        if code not in self._scripts:
            self._scripts[code] = resolve_language(code).script
        return self._scripts[code]


def _normalise_side(raw: str, rules: TextRules, *, script: str, other: str) -> NormalisedSide:
    text = rules.normalise(raw, other=other)
    plain = rules.without_placeholders(text)
    seen = script_classes(plain)
    return NormalisedSide(
        text,
        plain,
        script,
        count_letters(seen),
        count_visible(seen),
        count_script(seen, script=script),
        rules.placeholders(text),
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
