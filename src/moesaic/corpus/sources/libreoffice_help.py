"""LibreOffice's help: the paragraphs and headings of its HTML pages, by their ids.

Where a text differs between systems or programs (``TorchrunCommand`` on a Mac, ``Ctrl`` elsewhere), the
page holds every variant and shows one; only the default is read. Listings of code are left out.

LibreOfficeHelp: English and its translations from LibreOffice's help, paragraph by paragraph.
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
from moesaic.corpus.sources.apt import deb_members, debian_licence, fetch_debs
from moesaic.corpus.sources.text_source import (
    LanguageFilter,
    Progress,
    SourceFile,
    TextSource,
)

_BLOCK = re.compile(
    r'<(p|h[1-6])\s+id="((?:par|hd)_[^"]+)"([^>]*)>(.*?)</\1>', re.DOTALL | re.IGNORECASE
)


_CODE = re.compile(r'class="[^"]*code[^"]*"')


_SPAN = re.compile(r"<(/?)span\b([^>]*)>")


_HIDDEN = re.compile(r'\bhidden="true"')


_DEFAULT = re.compile(r'\bid="default')


_INLINE = re.compile(r'<(?:span\b[^>]*\bclass="([\w ]+)"|(a)\s[^>]*\bhref=|(sup|sub)\b)')


_LAYOUT = ("switchinline", "avis")  # wrap whatever stands there: no part of the text


def parse_help_page(page: str) -> Iterator[KeyedText]:
    """Yield the texts of a page; ``marks`` names their inline elements, sorted.

    Never raises: what is no such paragraph is passed over.
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
    """Take out the spans that are hidden and not the default, with all inside them."""
    if "hidden=" not in inner:
        return inner
    kept: list[str] = []
    at, depth, hidden = 0, 0, 0  # hidden: the depth of the outermost span left out
    for match in _SPAN.finditer(inner):
        if not hidden:
            kept.append(inner[at : match.start()])
        at = match.end()
        if match[1]:
            leaves = hidden == depth
            hidden = 0 if leaves else hidden
            depth -= 1
            kept += [] if leaves or hidden else [match[0]]
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


_PAGE = re.compile(r"/help/[\w-]+/(text/.+\.html)$")


class LibreOfficeHelp(TextSource):
    """Paragraphs of packages ``PREFIX-de`` ... that have the same page and id in ``english``'s."""

    prefix: str = "libreoffice-help"
    english: str = "en-us"

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
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
