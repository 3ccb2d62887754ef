"""Debian package descriptions and their translations (DDTP), downloaded with the user's apt.

Paragraphs are paired by position, for descriptions with the same English text (Description-md5) and
the same number of paragraphs on both sides.
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
from moesaic.corpus.sources.text_source import LanguageFilter, Progress, SourceFile, TextSource

ORIGIN = "debian-descriptions"
LICENCE = "see Debian's package descriptions"
_FILE = re.compile(r"_i18n_Translation-(.+)$")
_UNSPACED = ("Hans", "Hant", "Jpan", "Khmr", "Thai", "Laoo", "Mymr")
# the languages that were requested: apt does not report those that it lacks
_REQUESTED_FILE = "asked.txt"
_LIST_ITEM = re.compile(r"\s*[*•-]\s")

Description = tuple[str, ...]  # the summary, then the paragraphs


class DebianDescriptions(TextSource):
    """English and ``languages`` (apt's names) from the descriptions of the user's apt sources."""

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
        source_files = []
        for locale, path in _translation_files(lists):
            found = resolve_locale(locale)
            if found is not None and locale in self.languages:
                source_files.append(SourceFile(ORIGIN, path, version=locale, licence=LICENCE))
        if not source_files:
            raise DataError(
                f"{lists}: apt downloaded no translated descriptions: its sources have none"
            )
        return tuple(source_files)

    def read(self, source_file: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair]:
        found = resolve_locale(source_file.version)
        if found is None or not wanted(found.code):
            return
        english = _english_descriptions(source_file.path.parent)
        gap = "" if found.script in _UNSPACED else " "
        for digest, description in _descriptions(source_file.path, gap=gap):
            original = english.get(digest, ())
            if len(original) == len(description):
                for source, target in zip(original, description, strict=True):
                    yield Pair(
                        source, target, ENGLISH, found.code, source_file.name, source_file.licence
                    )


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
    """Yield paragraphs with their lines joined; a list item is a paragraph of its own."""
    paragraph: list[str] = []
    for line in lines:
        ends = line.strip() == "." or _LIST_ITEM.match(line)
        if ends and paragraph:
            yield _join_lines(paragraph, gap=gap)
            paragraph = []
        if line.strip() != ".":
            paragraph.append(_LIST_ITEM.sub("", line, count=1).strip())
    if paragraph:
        yield _join_lines(paragraph, gap=gap)


def _join_lines(lines: list[str], *, gap: str) -> str:
    """Join wrapped lines, with ``gap`` between two letters of the script and a space elsewhere."""
    text = lines[0]
    for line in lines[1:]:
        at_ascii = text[-1:].isascii() or line[:1].isascii()
        text += (" " if at_ascii else gap) + line
    return text
