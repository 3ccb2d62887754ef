"""Debian: pairs from the catalogues that Debian's packages install."""

import re
from collections.abc import Iterator
from importlib.resources import files

from pydantic import Field

from moesaic.data.builders.apt import deb_members, fetch_debs
from moesaic.data.builders.catalogues import ENGLISH, entry_to_pair, member_language, read_catalogue
from moesaic.data.builders.source import ProgressListener, TextSource, SourceFile, LanguageFilter
from moesaic.data.pair import Pair

_COPYRIGHT = re.compile(r"^\./usr/share/doc/[^/]+/copyright$")
_LICENCE = re.compile(r"^License:[ \t]*(\S[^\n]*)$", re.MULTILINE)
_MOST_NAMES = 4


def desktop_packages() -> tuple[str, ...]:
    """Return the packages of Debian 12 that were seen to carry catalogues (debian.txt)."""
    text = files("moesaic.data.builders").joinpath("debian.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line and not line.startswith("#"))


class DebianCatalogues(TextSource):
    """English and its translations from the .mo files of Debian packages, names or patterns."""

    packages: tuple[str, ...] = Field(default_factory=desktop_packages)

    def fetch(self, *, progress: ProgressListener) -> tuple[SourceFile, ...]:
        return fetch_debs(self.packages, progress=progress)

    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair]:
        licence = debian_licence(unit)
        for member in deb_members(unit.path, pattern=re.compile(r"\.mo$")):
            found = member_language(member.name)
            if found is None or found.code == ENGLISH or not wanted(found.code):
                continue
            for entry in read_catalogue(member.read(), name=f"{unit.path}:{member.name}"):
                pair = entry_to_pair(entry, found, origin=unit.name, licence=licence)
                if pair is not None:
                    yield pair


def debian_licence(unit: SourceFile) -> str:
    """Return the short names in a package's copyright file: a list, as packages mix licences."""
    for member in deb_members(unit.path, pattern=_COPYRIGHT):
        names = list(dict.fromkeys(_LICENCE.findall(member.read().decode("utf-8", "replace"))))
        more = " and others" if len(names) > _MOST_NAMES else ""
        return ", ".join(names[:_MOST_NAMES]) + more or "see its copyright file"
    return "see its copyright file"
