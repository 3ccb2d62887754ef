"""DDTP: Debian's package descriptions and their translations, as apt fetches them.

Paragraphs are paired by place, for descriptions whose English is unchanged (same Description-md5)
and that have as many paragraphs on both sides.
"""

import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from moesaic.core.errors import DataError
from moesaic.core.files import atomic_write
from moesaic.corpus.data_home import packages_dir
from moesaic.corpus.languages import ENGLISH, resolve_locale
from moesaic.corpus.pair import Pair
from moesaic.corpus.readers.text_lines import read_lines
from moesaic.corpus.sources.apt import run_apt
from moesaic.corpus.sources.text_source import (
    LanguageFilter,
    Progress,
    SourceFile,
    TextSource,
)

ORIGIN = "debian-descriptions"
LICENCE = "see Debian's package descriptions"
_FILE = re.compile(r"_i18n_Translation-(.+)$")
_UNSPACED = ("Hans", "Hant", "Jpan", "Khmr", "Thai", "Laoo", "Mymr")
_REQUESTED_FILE = (
    "asked.txt"  # the languages that a download was for: apt is silent on those it lacks
)
_LIST_ITEM = re.compile(r"\s*[*•-]\s")

Description = tuple[str, ...]  # the summary, then the paragraphs


class DebianDescriptions(TextSource):
    """English and ``languages`` (apt's names) from the descriptions of the user's own sources."""

    languages: tuple[str, ...] = (
        *("bg", "ca", "cs", "da", "de", "el", "eo", "es", "eu", "fi", "fr", "gl", "hr", "hu"),
        *("id", "it", "ja", "km", "ko", "ml", "nb", "nl", "pl", "pt", "pt_BR", "ro", "ru", "sk"),
        *("sl", "sr", "sv", "tr", "uk", "vi", "zh_CN", "zh_TW"),
    )

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        lists = packages_dir() / "ddtp" / "lists"
        if not set(self.languages) <= set(_requested_languages(lists)):
            progress("downloading Debian's package descriptions")
            _download(lists, languages=("en", *self.languages))
        units = []
        for locale, path in _translation_files(lists):
            found = resolve_locale(locale)
            if found is not None and locale in self.languages:
                units.append(SourceFile(ORIGIN, path, version=locale, licence=LICENCE))
        if not units:
            raise DataError(
                f"{lists}: apt brought no translated descriptions: its sources have none"
            )
        return tuple(units)

    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair]:
        found = resolve_locale(unit.version)
        if found is None or not wanted(found.code):
            return
        english = _english_descriptions(unit.path.parent)
        gap = "" if found.script in _UNSPACED else " "
        for digest, description in _descriptions(unit.path, gap=gap):
            known = english.get(digest, ())
            if len(known) == len(description):
                for source, target in zip(known, description, strict=True):
                    yield Pair(source, target, ENGLISH, found.code, unit.name, unit.licence)


def _download(lists: Path, *, languages: tuple[str, ...]) -> None:
    if shutil.which("apt-get") is None:
        raise DataError(
            "apt-get was not found: package descriptions come from Debian's archive. Build this "
            "corpus on Debian or Ubuntu (a container will do); `catalogues` needs no Debian"
        )
    part = lists.with_name("part").absolute()
    shutil.rmtree(part, ignore_errors=True)
    (part / "lists/partial").mkdir(parents=True)
    (part / "cache/archives/partial").mkdir(parents=True)
    options = {
        "Dir::State::Lists": part / "lists",
        "Dir::Cache": part / "cache",
        "Acquire::Languages": ",".join(languages),
        "Acquire::GzipIndexes": "false",
        "Acquire::IndexTargets::deb::Packages::DefaultEnabled": "false",
        "APT::Sandbox::User": "",
    }
    run_apt(["apt-get", "update", "-q", *(f"-o{k}={v}" for k, v in options.items())], folder=part)
    shutil.rmtree(lists, ignore_errors=True)
    atomic_write(part / "lists" / _REQUESTED_FILE, "\n".join(languages))
    (part / "lists").replace(lists)
    shutil.rmtree(part)


def _requested_languages(lists: Path) -> list[str]:
    path = lists / _REQUESTED_FILE
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def _translation_files(lists: Path) -> list[tuple[str, Path]]:
    found = []
    for path in sorted(lists.glob("*")):
        match = _FILE.search(unquote(path.name))
        if match:
            found.append((match[1], path))
    return found


@lru_cache(maxsize=1)
def _english_descriptions(lists: Path) -> dict[str, Description]:
    return {
        digest: description
        for locale, path in _translation_files(lists)
        if locale == "en"
        for digest, description in _descriptions(path, gap=" ")
    }


def _descriptions(path: Path, *, gap: str) -> Iterator[tuple[str, Description]]:
    digest, lines = "", []
    for _, line in read_lines(path):
        if line.startswith("Description-md5:"):
            digest, lines = line.partition(":")[2].strip(), []
        elif line.startswith("Description-"):
            lines = [line.partition(":")[2].strip(), "."]
        elif line.startswith(" ") and lines:
            lines.append(line[1:])
        elif not line and digest and lines:
            yield digest, tuple(_paragraphs(lines, gap=gap))
            digest, lines = "", []
    if digest and lines:
        yield digest, tuple(_paragraphs(lines, gap=gap))


def _paragraphs(lines: list[str], *, gap: str) -> Iterator[str]:
    """Join the lines of a paragraph; an item of a list is a paragraph of its own."""
    held: list[str] = []
    for line in lines:
        ends = line.strip() == "." or _LIST_ITEM.match(line)
        if ends and held:
            yield _join_lines(held, gap=gap)
            held = []
        if line.strip() != ".":
            held.append(_LIST_ITEM.sub("", line, count=1).strip())
    if held:
        yield _join_lines(held, gap=gap)


def _join_lines(lines: list[str], *, gap: str) -> str:
    """Join wrapped lines; a script without spaces has none where its own letters meet."""
    text = lines[0]
    for line in lines[1:]:
        ascii_meets = text[-1:].isascii() or line[:1].isascii()
        text += (" " if ascii_meets else gap) + line
    return text
