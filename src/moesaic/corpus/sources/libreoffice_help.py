"""LibreOffice help: English and translations of its HTML pages, paired by page and paragraph id.

Where a text differs between systems or programs (``Command`` on a Mac, ``Ctrl`` elsewhere), a page
has every variant and shows one; only the default is read. Code listings are left out.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lxml import etree, html  # pyright: ignore[reportAttributeAccessIssue]

from moesaic.corpus.languages import ENGLISH
from moesaic.corpus.pair import Pair, RejectedPair
from moesaic.corpus.readers.keyed_text import KeyedText, pair_by_key
from moesaic.corpus.sources.apt import LanguagePacks, deb_members, debian_licence
from moesaic.corpus.sources.text_source import LanguageFilter, Progress, SourceFile, TextSource

_PAGE = re.compile(r"/help/[\w-]+/(text/.+\.html)$")
_BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
_HIDDEN_VARIANTS = etree.XPath('.//span[@hidden="true"][not(starts-with(@id, "default"))]')
_INLINE = etree.XPath(".//span[@class] | .//a[@href] | .//sup | .//sub")
_WRAPPERS = ("switchinline", "avis")  # spans without a meaning


def parse_help_page(page: str) -> Iterator[KeyedText]:
    """Yield the paragraphs and headings of a page; ``invariants`` are their inline elements.

    Never raises: other elements are skipped.
    """
    try:
        root = html.document_fromstring(page.encode(), parser=html.HTMLParser(encoding="utf-8"))
    except etree.ParserError:  # an empty page
        return
    for block in root.iter(*_BLOCKS):
        key = block.get("id", "")
        if not key.startswith(("par_", "hd_")) or "code" in block.get("class", ""):
            continue
        for span in _HIDDEN_VARIANTS(block):
            span.drop_tree()
        for line_break in block.iter("br"):
            line_break.tail = f" {line_break.tail or ''}"
        text = " ".join(block.text_content().split())
        if text:
            yield KeyedText(key, text, _inline_elements(block))


def _inline_elements(block: html.HtmlElement) -> tuple[str, ...]:
    """Return the inline elements with their counts, sorted; spans by class."""
    found = Counter(element.get("class") or element.tag for element in _INLINE(block))
    return tuple(f"{name} {n}" for name, n in sorted(found.items()) if name not in _WRAPPERS)


class LibreOfficeHelp(TextSource):
    """Paragraphs of packages ``PREFIX-de`` ...; ``english`` is the locale of the English side."""

    prefix: str = "libreoffice-help"
    english: str = "en-us"

    @property
    def _packs(self) -> LanguagePacks:
        return LanguagePacks(self.prefix, (self.english,))

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        files = self._packs.fetch(progress=progress)
        found = ((file, self._packs.language(file)) for file in files)
        return tuple(file for file, language in found if language and language.code != ENGLISH)

    def read(
        self, source_file: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | RejectedPair]:
        found = self._packs.language(source_file)
        packages = self._packs.english_packs(source_file)
        if found is None or not wanted(found.code) or not packages:
            return
        english, licence = _english_paragraphs(packages[0]), debian_licence(source_file)
        for key, target in _paragraphs(source_file.path):
            if key in english:
                yield pair_by_key(
                    english[key],
                    target,
                    code=found.code,
                    origin=source_file.name,
                    licence=licence,
                    compare_numbers=True,
                )


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
