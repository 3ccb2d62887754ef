"""OfficeHelp: English and its translations from LibreOffice's help, paragraph by paragraph."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.data.builders.apt import deb_members, fetch_debs
from moesaic.data.builders.debian import debian_licence
from moesaic.data.builders.matched import ENGLISH, pair_by_key
from moesaic.data.builders.source import ProgressListener, TextSource, SourceFile, LanguageFilter
from moesaic.data.languages import resolve_locale
from moesaic.data.pair import Pair, RejectedPair
from moesaic.data.readers.keyed import KeyedText
from moesaic.data.readers.office_help import parse_help_page

_PAGE = re.compile(r"/help/[\w-]+/(text/.+\.html)$")


class LibreOfficeHelp(TextSource):
    """Paragraphs of packages ``PREFIX-de`` ... that have the same page and id in ``english``'s."""

    prefix: str = "libreoffice-help"
    english: str = "en-us"

    def fetch(self, *, progress: ProgressListener) -> tuple[SourceFile, ...]:
        units = fetch_debs((f"{self.prefix}-*",), progress=progress)
        if not any(_english_pages(unit, self) for unit in units if not unit.missing_reason):
            raise DataError(
                f"{self.prefix}-{self.english} could not be had: it is the English side of all"
            )
        return tuple(u for u in units if self._code(u) not in ("", ENGLISH))

    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair | RejectedPair]:
        code = self._code(unit)
        english_at = _english_pages(unit, self)
        if not wanted(code) or english_at is None:
            return
        english, licence = _english_paragraphs(english_at), debian_licence(unit)
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

    def _code(self, unit: SourceFile) -> str:
        found = resolve_locale(unit.name.removeprefix(f"{self.prefix}-"))
        return found.code if found else ""


def _english_pages(unit: SourceFile, source: LibreOfficeHelp) -> Path | None:
    """The English package beside a unit, of its own version."""
    rest = unit.path.name.partition("_")[2]
    path = unit.path.with_name(f"{source.prefix}-{source.english}_{rest}")
    return path if rest and path.is_file() else None


@lru_cache(maxsize=1)
def _english_paragraphs(path: Path) -> dict[str, KeyedText]:
    return dict(_paragraphs(path))


def _paragraphs(path: Path) -> Iterator[tuple[str, KeyedText]]:
    """The paragraphs of a package by page and id; a page shown inside others is read once."""
    seen: set[str] = set()
    for page in deb_members(path, pattern=_PAGE):
        match = _PAGE.search(page.name)
        assert match is not None
        for found in parse_help_page(page.read().decode("utf-8", "replace")):
            key = f"{match[1]}:{found.key}"
            if key not in seen:
                seen.add(key)
                yield key, found
