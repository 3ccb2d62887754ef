"""OfficeHelp: English and its translations from LibreOffice's help, paragraph by paragraph."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.data.builders.apt import deb_members, fetch_debs
from moesaic.data.builders.debian import licence_of
from moesaic.data.builders.matched import ENGLISH, matched
from moesaic.data.builders.source import Progress, Source, Unit, Wanted
from moesaic.data.languages import catalogue_language
from moesaic.data.pair import Pair, Unfit
from moesaic.data.readers.keyed import Keyed
from moesaic.data.readers.office_help import parse_office_help

_PAGE = re.compile(r"/help/[\w-]+/(text/.+\.html)$")


class OfficeHelp(Source):
    """Paragraphs of packages ``PREFIX-de`` ... that have the same page and id in ``english``'s."""

    prefix: str = "libreoffice-help"
    english: str = "en-us"

    def fetch(self, *, progress: Progress) -> tuple[Unit, ...]:
        units = fetch_debs((f"{self.prefix}-*",), progress=progress)
        if not any(_english_pages(unit, self) for unit in units if not unit.missing):
            raise DataError(
                f"{self.prefix}-{self.english} could not be had: it is the English side of all"
            )
        return tuple(u for u in units if self._code(u) not in ("", ENGLISH))

    def read(self, unit: Unit, *, wanted: Wanted) -> Iterator[Pair | Unfit]:
        code = self._code(unit)
        english_at = _english_pages(unit, self)
        if not wanted(code) or english_at is None:
            return
        english, licence = _english(english_at), licence_of(unit)
        for key, target in _paragraphs(unit.path):
            if key in english:
                yield matched(
                    english[key],
                    target,
                    code=code,
                    origin=unit.name,
                    licence=licence,
                    numbers=True,
                )

    def _code(self, unit: Unit) -> str:
        found = catalogue_language(unit.name.removeprefix(f"{self.prefix}-"))
        return found.code if found else ""


def _english_pages(unit: Unit, source: OfficeHelp) -> Path | None:
    """The English package beside a unit, of its own version."""
    rest = unit.path.name.partition("_")[2]
    path = unit.path.with_name(f"{source.prefix}-{source.english}_{rest}")
    return path if rest and path.is_file() else None


@lru_cache(maxsize=1)
def _english(path: Path) -> dict[str, Keyed]:
    return dict(_paragraphs(path))


def _paragraphs(path: Path) -> Iterator[tuple[str, Keyed]]:
    """The paragraphs of a package by page and id; a page shown inside others is read once."""
    seen: set[str] = set()
    for page in deb_members(path, wanted=_PAGE):
        match = _PAGE.search(page.name)
        assert match is not None
        for found in parse_office_help(page.read().decode("utf-8", "replace")):
            key = f"{match[1]}:{found.key}"
            if key not in seen:
                seen.add(key)
                yield key, found
