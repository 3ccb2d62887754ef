"""Languages: one table of FLORES-style codes, and every spelling that leads to them.

A code is ``<iso 639-3>_<Script>`` as in FLORES-200 (arXiv:2207.04672), e.g. ``deu_Latn``. A
regional standard that is translated on its own adds the region: ``por_Latn`` is European Portuguese
(``pt``), ``por_Latn_BR`` Brazilian (``pt-BR``). Chinese is told apart by script alone. The table is
``languages.tsv``: add a row and the language exists everywhere.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from moesaic.core.errors import DataError, did_you_mean

ENGLISH = "eng_Latn"
_SCRIPT_OF_MODIFIER = {
    "latin": "Latn",
    "latn": "Latn",
    "iqtelif": "Latn",
    "cyrillic": "Cyrl",
    "cyrl": "Cyrl",
    "devanagari": "Deva",
    "arabic": "Arab",
    "aran": "Arab",
}


@dataclass(frozen=True, slots=True)
class Language:
    """One written language. ``region`` is where it is at home, e.g. ``DE``; may be empty."""

    code: str
    name: str
    script: str
    bcp47: str
    iso1: str | None
    region: str = ""
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.code


@dataclass(frozen=True, slots=True)
class _LocaleParts:
    """A locale name taken apart: ``sr_RS@latin`` is sr, Latn, RS."""

    language: str
    script: str
    region: str
    modifier: str


def resolve_language(text: str) -> Language:
    """Resolve FLORES, BCP-47, POSIX, ISO 639-1/2/3 codes and English names.

    A region without a row of its own is left out: ``es-MX`` is ``spa_Latn``. Raises DataError with
    the nearest known spelling.
    """
    table = _spellings()
    found = table.get(_normalise_spelling(text))
    if found is None:
        parts = _parse_locale(text)
        if parts is not None and not parts.modifier:
            found = _find_language(parts, region=parts.region) or _find_language(parts, region="")
    if found is None:
        raise DataError(
            f'unknown language "{text}": expected a code such as deu_Latn, de, pt-BR, zh_Hans or '
            f"sr@latin{did_you_mean(text, _display_spellings())}"
        )
    return found


def resolve_locale(locale: str) -> Language | None:
    """Resolve the name of a catalogue's folder or file; None for variants and unknown names.

    ``fr_FR`` is French; ``fr_CA``, ``es_MX`` and ``ca@valencia`` are variants, and mixing them into
    the main language would teach it two standards at once.
    """
    found = _spellings().get(_normalise_spelling(locale))
    if found is not None:
        return found
    parts = _parse_locale(locale)
    if parts is None or parts.modifier:
        return None
    found = _find_language(parts, region=parts.region) or _find_language(parts, region="")
    if found is None:
        return None
    at_home = not parts.region or parts.region == found.region
    return found if at_home else None


@cache
def all_languages() -> tuple[Language, ...]:
    """Return the table of languages, sorted by code."""
    text = files("moesaic.corpus").joinpath("languages.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return tuple(
        Language(
            code, name, code.split("_")[1], bcp47, iso1 or None, region, tuple(aliases.split())
        )
        for code, name, bcp47, iso1, region, aliases in rows
    )


@cache
def _spellings() -> dict[str, Language]:
    """Every accepted spelling; bare codes lead to the language's row with the fewest subtags."""
    table: dict[str, Language] = {}
    for row in sorted(all_languages(), key=lambda r: (r.bcp47.count("-"), r.code)):
        for spelling in _spellings_of(row):
            table.setdefault(_normalise_spelling(spelling), row)
    return table


def _spellings_of(row: Language) -> Iterator[str]:
    lang, script, *region = row.code.split("_")
    short = row.bcp47.split("-")[0]
    yield from (row.code, row.bcp47, row.name, *row.aliases)
    if region:
        return
    for base in {lang, short, row.iso1 or short, *(a for a in row.aliases if a.isalpha())}:
        yield f"{base}-{script}"
        yield base


@cache
def _display_spellings() -> tuple[str, ...]:
    return tuple(
        n for row in all_languages() for n in (row.code, row.bcp47, row.name, *row.aliases)
    )


def _find_language(parts: _LocaleParts, *, region: str) -> Language | None:
    steps = [s for s in (parts.language, parts.script, region) if s]
    return _spellings().get(_normalise_spelling("-".join(steps)))


def _normalise_spelling(text: str) -> str:
    return text.strip().replace("_", "-").casefold()


def _parse_locale(text: str) -> _LocaleParts | None:
    match = re.fullmatch(
        r"([A-Za-z]{2,3})(?:[_-]([A-Za-z]{4}))?(?:[_-]([A-Za-z]{2}|\d{3}))?"
        r"(?:\.[\w-]+)?(?:@(\w+))?",
        text.strip(),
    )
    if match is None:
        return None
    lang, script, region, modifier = (g or "" for g in match.groups())
    known = _SCRIPT_OF_MODIFIER.get(modifier.casefold(), "")
    rest = "" if known or modifier.casefold() == "euro" else modifier
    return _LocaleParts(lang.casefold(), script or known, region.upper(), rest)
