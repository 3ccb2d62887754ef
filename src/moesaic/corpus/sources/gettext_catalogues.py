"""Gettext catalogues (.mo, .po) of Python and Debian packages, as pairs with English."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.resources import files

from pydantic import Field, field_validator

from moesaic.corpus.languages import ENGLISH, Language, resolve_locale
from moesaic.corpus.pair import Pair, RejectedPair
from moesaic.corpus.readers.gettext import PLURAL_FORMS, CatalogueEntry, parse_mo, parse_po
from moesaic.corpus.sources.apt import deb_members, debian_licence, fetch_debs
from moesaic.corpus.sources.package_archives import (
    ArchiveMember,
    PyPIPackage,
    archive_members,
    fetch_package,
)
from moesaic.corpus.sources.text_source import LanguageFilter, Progress, SourceFile, TextSource

_IN_FOLDER = re.compile(r"(?:^|/)([^/]+)/(?:LC_MESSAGES/)?[^/]+\.(mo|po)$")
_IN_NAME = re.compile(r"(?:^|/)(?:[\w.]+[-.])?([A-Za-z]{2,3}(?:[_@-]\w+)*)\.(mo|po)$")
_MO = re.compile(r"\.mo$")
_KEY = re.compile(r"[a-z0-9]++(?:[_.][a-z0-9]++)++|[A-Z0-9]++(?:_[A-Z0-9]++)++")


def desktop_packages() -> tuple[str, ...]:
    """Return the packages of Debian 12 that are found to have catalogues (debian.txt)."""
    text = files("moesaic.corpus.sources").joinpath("debian.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line and not line.startswith("#"))


class PyPICatalogues(TextSource):
    """English and its translations from the catalogues of packages on PyPI."""

    packages: tuple[PyPIPackage, ...]

    @field_validator("packages")
    @classmethod
    def _are_distinct(cls, packages: tuple[PyPIPackage, ...]) -> tuple[PyPIPackage, ...]:
        names = [package.name for package in packages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"listed twice: {', '.join(twice)}; its pairs would count twice")
        return packages

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        return tuple(fetch_package(p, progress=progress) for p in self.packages)

    def read(
        self, source_file: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | RejectedPair]:
        kind = next((p.catalogues for p in self.packages if p.name == source_file.name), "mo")
        with archive_members(source_file.path) as files:
            yield from _pairs(choose_members(files, kind=kind), source_file, wanted=wanted)


class DebianCatalogues(TextSource):
    """English and its translations from the .mo files of Debian packages, names or patterns."""

    packages: tuple[str, ...] = Field(default_factory=desktop_packages)

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        return fetch_debs(self.packages, progress=progress)

    def read(
        self, source_file: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | RejectedPair]:
        licensed = replace(source_file, licence=debian_licence(source_file))
        yield from _pairs(deb_members(source_file.path, pattern=_MO), licensed, wanted=wanted)


def _pairs(
    members: Iterable[ArchiveMember], source_file: SourceFile, *, wanted: LanguageFilter
) -> Iterator[Pair | RejectedPair]:
    for member in members:
        target = member_language(member.name)
        if target is None or target.code == ENGLISH or not wanted(target.code):
            continue
        parse = parse_mo if member.name.endswith(".mo") else parse_po
        for entry in parse(member.read(), name=f"{source_file.path}:{member.name}"):
            if not isinstance(entry, CatalogueEntry):
                yield RejectedPair(ENGLISH, target.code, PLURAL_FORMS)
            elif not _KEY.fullmatch(entry.source):  # a key, not a text
                yield Pair(
                    entry.source,
                    entry.target,
                    ENGLISH,
                    target.code,
                    source_file.name,
                    source_file.licence,
                )


def choose_members(files: list[ArchiveMember], *, kind: str) -> list[ArchiveMember]:
    """Return each catalogue once, sorted by name, as ``kind`` if it exists both as .mo and .po."""
    best: dict[str, ArchiveMember] = {}
    for member in sorted(files, key=lambda m: m.name):
        stem, _, suffix = member.name.rpartition(".")
        if suffix in ("mo", "po") and (stem not in best or suffix == kind):
            best[stem] = member
    return list(best.values())


def member_language(name: str) -> Language | None:
    """Return the language in a catalogue's path: ``locale/de/LC_MESSAGES/x.mo``, ``de.po``.

    Under LC_MESSAGES a file is named after its program, even where the name is a language code:
    LibreOffice's ``de/LC_MESSAGES/sw.mo`` is Writer in German and not Swahili.
    """
    by_folder = "/LC_MESSAGES/" in name
    for pattern in (_IN_FOLDER,) if by_folder else (_IN_NAME, _IN_FOLDER):
        match = pattern.search(name)
        found = resolve_locale(match[1]) if match else None
        if found is not None:
            return found
    return None
