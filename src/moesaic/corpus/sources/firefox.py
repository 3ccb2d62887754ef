"""Firefox messages: English and translations from language packs in Debian packages, paired by key.

A language pack is a zip archive of Fluent and properties files. Canadian English is the English
side, then British English where it lacks a key: American English is inside the program.
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.pair import Pair, RejectedPair
from moesaic.corpus.readers.fluent import parse_fluent
from moesaic.corpus.readers.keyed_text import KeyedText, merge_first_wins, pair_by_key
from moesaic.corpus.readers.properties import parse_properties
from moesaic.corpus.sources.apt import LanguagePacks, deb_members, debian_licence
from moesaic.corpus.sources.text_source import LanguageFilter, Progress, SourceFile, TextSource

_PACK = re.compile(r"/langpack-([\w-]+)@[^/]+\.xpi$")
# access keys, window sizes and the like: values that are not texts
_NO_TEXT = re.compile(
    r"(?i)(?:^|[.\-_])(?:style|\w*keys?|keycode|shortcut|url|uri|href|charset)\d*$"
)
_MOZILLA = re.compile(r"%(\d+\$)?S")  # a UTF-16 string: printf's %s
_COUNT = re.compile(r"(?<!\w)#([1-9])(?!\d)")
_PLURAL_KEYS = frozenset(("zero", "one", "two", "few", "many", "other"))


class FirefoxMessages(TextSource):
    """Messages of packages ``PREFIX-de`` ...; ``english`` are the locales of the English side."""

    prefix: str = "firefox-esr-l10n"
    english: tuple[str, ...] = ("en-ca", "en-gb")

    @property
    def _packs(self) -> LanguagePacks:
        return LanguagePacks(self.prefix, self.english)

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        files = self._packs.fetch(progress=progress)
        return tuple(file for file in files if self._packs.language(file) is not None)

    def read(
        self, source_file: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | RejectedPair]:
        found = self._packs.language(source_file)
        if found is None or not wanted(found.code):
            return
        english = _english_messages(self._packs.english_packs(source_file))
        licence = debian_licence(source_file)
        for key, target in _messages(source_file.path).items():
            if key in english:
                yield pair_by_key(
                    english[key], target, code=found.code, origin=source_file.name, licence=licence
                )


@lru_cache(maxsize=1)
def _english_messages(packs: tuple[Path, ...]) -> dict[str, KeyedText]:
    return merge_first_wins(*(_messages(path) for path in packs))


def _messages(path: Path) -> dict[str, KeyedText]:
    """Return the texts of a package by file and key."""
    texts: dict[str, KeyedText] = {}
    for pack in deb_members(path, pattern=_PACK):
        try:
            with zipfile.ZipFile(BytesIO(pack.read())) as archive:
                texts |= dict(_archive_messages(archive, name=pack.name))
        except (zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{path}: {pack.name} is damaged ({error}); delete the file") from error
    return texts


def _archive_messages(archive: zipfile.ZipFile, *, name: str) -> Iterator[tuple[str, KeyedText]]:
    match = _PACK.search(name)
    assert match is not None
    locale = re.compile(rf"(?<=/){re.escape(match[1])}(?=/)")
    for file in archive.namelist():
        where = locale.sub("*", file)
        for found in _file_messages(file, archive):
            yield f"{where}:{found.key}", found


def _file_messages(name: str, archive: zipfile.ZipFile) -> Iterator[KeyedText]:
    if not name.endswith((".ftl", ".properties")):
        return
    text = archive.read(name).decode("utf-8-sig", "replace")
    if name.endswith(".ftl"):
        for found in parse_fluent(text):
            if not _NO_TEXT.search(found.key):
                yield replace(found, invariants=tuple(map(_variant_category, found.invariants)))
        return
    for found in parse_properties(enumerate(text.split("\n"), start=1), name=name):
        if not _NO_TEXT.search(found.key):
            yield replace(found, text=_plain_text(found.text))


def _variant_category(key: str) -> str:
    """Map plural categories, which differ between languages, to one; keep other variant keys."""
    return "other" if key in _PLURAL_KEYS or key[0].isdigit() else key


def _plain_text(text: str) -> str:
    """Return the last plural form (``#1 tab;#1 tabs``), with printf placeholders."""
    if ";" in text and _COUNT.search(text):
        text = _COUNT.sub(r"%\1$s", text.split(";")[-1])
    return _MOZILLA.sub(lambda match: f"%{match[1] or ''}s", text)
