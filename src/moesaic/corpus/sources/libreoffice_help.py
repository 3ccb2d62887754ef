"""LibreOffice help: English and translations of its HTML pages, paired by page and paragraph id.

Where a text differs between systems or programs (``Command`` on a Mac, ``Ctrl`` elsewhere), a page
has every variant and shows one; only the default is read. Code listings are left out.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.languages import ENGLISH, resolve_locale
from moesaic.corpus.markup import strip_tags, unescape_entities
from moesaic.corpus.pair import Pair, RejectedPair
from moesaic.corpus.readers.keyed_text import KeyedText, pair_by_key
from moesaic.corpus.sources.apt import (
    deb_members,
    debian_licence,
    fetch_debs,
    packages_of_same_version,
)
from moesaic.corpus.sources.text_source import (
    LanguageFilter,
    Progress,
    SourceFile,
    TextSource,
)

_PAGE = re.compile(r"/help/[\w-]+/(text/.+\.html)$")
_BLOCK = re.compile(
    r'<(p|h[1-6])\s+id="((?:par|hd)_[^"]+)"([^>]*)>(.*?)</\1>', re.DOTALL | re.IGNORECASE
)
_CODE = re.compile(r'class="[^"]*code[^"]*"')
_SPAN = re.compile(r"<(/?)span\b([^>]*)>")
_HIDDEN = re.compile(r'\bhidden="true"')
_DEFAULT = re.compile(r'\bid="default')
_INLINE = re.compile(r'<(?:span\b[^>]*\bclass="([\w ]+)"|(a)\s[^>]*\bhref=|(sup|sub)\b)')
_LAYOUT = ("switchinline", "avis")  # wrappers without a meaning


def parse_help_page(page: str) -> Iterator[KeyedText]:
    """Yield the paragraphs and headings of a page; ``invariants`` are their inline elements.

    Never raises: other elements are skipped.
    """
    for match in _BLOCK.finditer(page):
        _, key, attributes, inner = match.groups()
        if _CODE.search(attributes):
            continue
        shown = _without_variants(inner)
        text = " ".join(unescape_entities(strip_tags(shown)).split())
        if text:
            yield KeyedText(key, text, _inline_elements(shown))


def _without_variants(inner: str) -> str:
    """Remove hidden spans, except for the default variant, with their content."""
    if "hidden=" not in inner:
        return inner
    kept: list[str] = []
    at, depth, hidden = 0, 0, 0  # hidden: depth of the outermost removed span
    for match in _SPAN.finditer(inner):
        if not hidden:
            kept.append(inner[at : match.start()])
        at = match.end()
        if match[1]:
            closes = hidden == depth
            hidden = 0 if closes else hidden
            depth -= 1
            kept += [] if closes or hidden else [match[0]]
            continue
        depth += 1
        if not hidden and _HIDDEN.search(match[2]) and not _DEFAULT.search(match[2]):
            hidden = depth
        elif not hidden:
            kept.append(match[0])
    return "".join([*kept, "" if hidden else inner[at:]])


def _inline_elements(shown: str) -> tuple[str, ...]:
    found = Counter(next(g for g in m.groups() if g) for m in _INLINE.finditer(shown))
    return tuple(f"{name} {n}" for name, n in sorted(found.items()) if name not in _LAYOUT)


class LibreOfficeHelp(TextSource):
    """Paragraphs of packages ``PREFIX-de`` ...; ``english`` is the locale of the English side."""

    prefix: str = "libreoffice-help"
    english: str = "en-us"

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        units = fetch_debs((f"{self.prefix}-*",), progress=progress)
        if not any(self._english_packages(unit) for unit in units if not unit.missing_reason):
            raise DataError(
                f"{self.prefix}-{self.english} could not be downloaded: it is the English side"
            )
        return tuple(u for u in units if self._code(u) not in ("", ENGLISH))

    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair | RejectedPair]:
        code = self._code(unit)
        packages = self._english_packages(unit)
        if not wanted(code) or not packages:
            return
        english, licence = _english_paragraphs(packages[0]), debian_licence(unit)
        for key, target in _paragraphs(unit.path):
            if key in english:
                yield pair_by_key(
                    english[key],
                    target,
                    code=code,
                    origin=unit.name,
                    licence=licence,
                    compare_numbers=True,
                )

    def _english_packages(self, unit: SourceFile) -> tuple[Path, ...]:
        return packages_of_same_version(unit, names=[f"{self.prefix}-{self.english}"])

    def _code(self, unit: SourceFile) -> str:
        found = resolve_locale(unit.name.removeprefix(f"{self.prefix}-"))
        return found.code if found else ""


@lru_cache(maxsize=1)
def _english_paragraphs(path: Path) -> dict[str, KeyedText]:
    return dict(_paragraphs(path))


def _paragraphs(path: Path) -> Iterator[tuple[str, KeyedText]]:
    """Yield the paragraphs of a package by page and id; an id that recurs in a page once."""
    seen: set[str] = set()
    for page in deb_members(path, pattern=_PAGE):
        match = _PAGE.search(page.name)
        assert match is not None
        for found in parse_help_page(page.read().decode("utf-8", "replace")):
            key = f"{match[1]}:{found.key}"
            if key not in seen:
                seen.add(key)
                yield key, found
