"""Languages: a table of FLORES-style codes, and the spellings that resolve to them.

A code is ``<iso 639-3>_<Script>`` as in FLORES-200 (arXiv:2207.04672), e.g. ``deu_Latn``. A
regional standard with translations of its own adds the region: ``por_Latn`` is European Portuguese
(``pt``), ``por_Latn_BR`` Brazilian (``pt-BR``). Chinese is divided by script alone.

The table is ``languages.tsv``; a new row adds a language. It is not derived from CLDR's likely
subtags: FLORES codes name individual languages (``arb``, ``pes``, ``npi``) where BCP-47 has the
macrolanguage, so codes, names or regions of 115 rows differ. Where a region decides the script is
CLDR's: ``region_scripts.py``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

from moesaic.core.errors import DataError, did_you_mean, printable
from moesaic.corpus.region_scripts import LANGUAGE_OF_REGION, SCRIPT_OF_REGION

ENGLISH = "eng_Latn"
UNDETERMINED = "und_Zyyy"  # text whose language nobody states
_LONGEST = 100  # characters of a spelling
# zh-yue-Hant-HK-x-mine: language, extended language, script, region, variants, extensions
_BCP47 = re.compile(
    r"(?P<language>[A-Za-z]{2,3})(?P<extended>(?:-[A-Za-z]{3}(?![A-Za-z0-9]))?)"
    r"(?:-(?P<script>[A-Za-z]{4})(?![A-Za-z0-9]))?(?:-(?P<region>[A-Za-z]{2}|\d{3})(?![A-Za-z0-9]))?"
    r"(?P<variants>(?:-(?:[A-Za-z0-9]{5,8}|\d[A-Za-z0-9]{3})(?![A-Za-z0-9]))*)"
    r"(?:-[A-WYZa-wyz0-9](?:-[A-Za-z0-9]{2,8})+)*(?:-[xX](?:-[A-Za-z0-9]{1,8})+)?"
)
_POSIX = re.compile(r"([^.@]+)(?:\.[\w-]+)?(?:@(\w+))?")  # sr_RS.UTF-8@latin
_SCRIPT_OF_MODIFIER = {
    "latin": "Latn",
    "latn": "Latn",
    "iqtelif": "Latn",
    "ijekavianlatin": "Latn",
    "cyrillic": "Cyrl",
    "cyrl": "Cyrl",
    "devanagari": "Deva",
    "arabic": "Arab",
    "aran": "Arab",
}
_VARIANTS = ("ijekavian", "ijekavianlatin", "valencia", "tarask", "quot", "boldquot")
_MODIFIERS = ("", "euro", *_VARIANTS, *_SCRIPT_OF_MODIFIER)
_EXTENDED = ("ar", "kok", "lv", "ms", "sgn", "sw", "uz", "zh")  # have extended languages
_ROMANISED = ("alalc97", "hepburn", "jyutping", "pinyin", "tongyong", "wadegile")
_PHONETIC = ("fonipa", "fonkirsh", "fonnapa", "fonupa", "fonxsamp")
# registered before there was a syntax (RFC 5646), or a variant that is a language
_IRREGULAR = {
    "hy-arevmda": "hyw", "i-hak": "hak", "i-lux": "lb", "i-navajo": "nv", "no-bok": "nb",
    "no-nyn": "nn", "no@nynorsk": "nn", "zh-guoyu": "zh", "zh-hakka": "hak", "zh-min-nan": "nan",
    "no-no@nynorsk": "nn", "zh-chs": "zh-hans", "zh-cht": "zh-hant",
}  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class _Resolved:
    """The language of a spelling, and what of the spelling its code does not hold."""

    language: Language | None
    region: str = ""
    variant: str = ""


def resolve_language(text: str) -> Language:
    """Resolve FLORES, BCP-47, POSIX, ISO 639-1/2/3 codes and English names.

    A region that decides the script or the language is kept (``zh-HK`` is ``zho_Hant``), any other
    without a row of its own is ignored: ``es-MX`` is ``spa_Latn``. So are variants that do not
    change the script: ``de-CH-1996``, ``ca-valencia``. Raises DataError with the nearest spelling
    of the table.
    """
    found = find_language(text)
    if found is None:
        nearest = did_you_mean(text[:_LONGEST], _display_spellings())
        raise DataError(
            f'unknown language "{printable(text, limit=_LONGEST)}": expected a code such as '
            f"deu_Latn, de, pt-BR, zh_Hans or sr@latin{nearest}"
        )
    return found


def find_language(text: str) -> Language | None:
    """Resolve as ``resolve_language`` does; None where it raises."""
    return _resolve(text).language


def precise_tag(text: str) -> str:
    """Return the code, or the tag itself where it says more than its code does: ``de-AT``.

    Raises DataError as ``resolve_language`` does.
    """
    code, found = resolve_language(text).code, _resolve(text)
    return _normalise_spelling(text) if found.region or found.variant else code


def is_same_tag(first: str, second: str) -> bool:
    """Whether two spellings differ in case and separators only."""
    return _normalise_spelling(first) == _normalise_spelling(second)


def resolve_locale(locale: str) -> Language | None:
    """Resolve the locale of a catalogue's folder or file; None for variants and unknown names.

    ``fr_FR`` is French; ``fr_CA``, ``es_MX`` and ``ca@valencia`` are variants: under the main
    language's code, they would mix two standards.
    """
    found = _resolve(locale)
    if found.language is None or found.variant:
        return None
    return found.language if found.region in ("", found.language.region) else None


@lru_cache(maxsize=4096)
def _resolve(text: str) -> _Resolved:
    if len(text) > _LONGEST:
        return _Resolved(None)
    spelled = _normalise_spelling(text)
    found = _spellings().get(spelled) or _spellings().get(_IRREGULAR.get(spelled, ""))
    if found is not None:
        return _Resolved(found)
    posix = _POSIX.fullmatch(spelled)
    tag = _BCP47.fullmatch(posix[1]) if posix else None
    modifier = (posix[2] or "") if posix else ""
    if tag is None or modifier not in _MODIFIERS:
        return _Resolved(None)
    variants = tag["variants"].split("-")[1:]
    if any(variant in _PHONETIC for variant in variants):
        return _Resolved(None)
    script = tag["script"] or _SCRIPT_OF_MODIFIER.get(modifier, "")
    if not script and any(variant in _ROMANISED for variant in variants):
        script = "Latn"
    if tag["extended"] and tag["language"] not in _EXTENDED:
        return _Resolved(None)
    language = tag["extended"][1:] or tag["language"]
    region = (tag["region"] or "").upper()
    variant = "-".join(variants) or (modifier if modifier in _VARIANTS else "")
    for subtags in _candidates(language, script, region):
        found = _spellings().get(_normalise_spelling("-".join(filter(None, subtags))))
        if found is not None:
            return _Resolved(found, region, variant)
    return _Resolved(None, region, variant)


def _candidates(language: str, script: str, region: str) -> Iterator[tuple[str, ...]]:
    """Yield the spellings of a tag, exact first; a region that decides is never dropped."""
    yield language, script, region
    base = _spellings().get(language)
    short = base.bcp47.split("-")[0] if base else language
    own = LANGUAGE_OF_REGION.get((short, region), "")
    decided = SCRIPT_OF_REGION.get((short, region), "")
    if own and not script:
        yield (own,)
    elif decided and not script:
        yield language, decided
        yield short, decided
    else:
        yield language, script
        yield short, script


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
    for base in {lang, short, row.iso1 or short, *(a for a in row.aliases if a.isalpha())}:
        yield "-".join((base, script, *region))
        yield "-".join((base, *region))


@cache
def _display_spellings() -> tuple[str, ...]:
    return tuple(
        n for row in all_languages() for n in (row.code, row.bcp47, row.name, *row.aliases)
    )


def _normalise_spelling(text: str) -> str:
    return text.strip().replace("_", "-").casefold()
