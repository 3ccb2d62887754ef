"""Languages: a table of FLORES-style codes, and the spellings that resolve to them.

A code is ``<iso 639-3>_<Script>`` as in FLORES-200 (arXiv:2207.04672), e.g. ``deu_Latn``. A
regional standard with translations of its own adds the region: ``por_Latn`` is European Portuguese
(``pt``), ``por_Latn_BR`` Brazilian (``pt-BR``). Chinese is divided by script alone.

The table is ``languages.tsv``; a new row adds a language. It is not derived from CLDR's likely
subtags: FLORES codes name individual languages (``arb``, ``pes``, ``npi``) where BCP-47 has the
macrolanguage, so codes, names or regions of 115 rows differ.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from moesaic.core.errors import DataError, did_you_mean

ENGLISH = "eng_Latn"
# sr_RS.UTF-8@latin: language, script, region, encoding, modifier
_LOCALE = re.compile(
    r"([A-Za-z]{2,3})(?:[_-]([A-Za-z]{4}))?(?:[_-]([A-Za-z]{2}|\d{3}))?(?:\.[\w-]+)?(?:@(\w+))?"
)
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
    """A language in one script. ``region`` is the region of its standard, e.g. ``DE``, if any."""

    code: str
    name: str
    script: str
    bcp47: str
    iso1: str | None
    region: str = ""
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.code


def resolve_language(text: str) -> Language:
    """Resolve FLORES, BCP-47, POSIX, ISO 639-1/2/3 codes and English names.

    A region without a row of its own is ignored: ``es-MX`` is ``spa_Latn``. Raises DataError with
    the nearest spelling of the table.
    """
    found, _ = _resolve(text)
    if found is None:
        raise DataError(
            f'unknown language "{text}": expected a code such as deu_Latn, de, pt-BR, zh_Hans or '
            f"sr@latin{did_you_mean(text, _display_spellings())}"
        )
    return found


def resolve_locale(locale: str) -> Language | None:
    """Resolve the locale of a catalogue's folder or file; None for variants and unknown names.

    ``fr_FR`` is French; ``fr_CA``, ``es_MX`` and ``ca@valencia`` are variants: under the main
    language's code, they would mix two standards.
    """
    found, region = _resolve(locale)
    return found if found is not None and region in ("", found.region) else None


def _resolve(text: str) -> tuple[Language | None, str]:
    """Return the language of a spelling, and the region that was ignored to find it."""
    found = _spellings().get(_normalise_spelling(text))
    if found is not None:
        return found, ""
    match = _LOCALE.fullmatch(text.strip())
    if match is None:
        return None, ""
    language, script, region, modifier = (group or "" for group in match.groups())
    if modifier.casefold() not in ("", "euro", *_SCRIPT_OF_MODIFIER):
        return None, ""
    script = script or _SCRIPT_OF_MODIFIER.get(modifier.casefold(), "")
    region = region.upper()
    for subtags in ((language, script, region), (language, script)):
        found = _spellings().get(_normalise_spelling("-".join(filter(None, subtags))))
        if found is not None:
            return found, region
    return None, region


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


def _normalise_spelling(text: str) -> str:
    return text.strip().replace("_", "-").casefold()
