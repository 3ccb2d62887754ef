"""Local files: the user's files in any format that readers support, and folders split already."""

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import model_validator

from moesaic.core.config import Config
from moesaic.core.errors import DataError
from moesaic.corpus.languages import ENGLISH, resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers.formats import read_pairs, read_texts
from moesaic.corpus.readers.moses import moses_file
from moesaic.corpus.readers.text_lines import require_rows
from moesaic.corpus.readers.tsv import read_rows
from moesaic.corpus.sources.text_source import (
    AllowedSplit,
    LanguageFilter,
    Progress,
    SourceFile,
    TextSource,
)

_SPLIT_FILE = re.compile(r"(?P<language>.+)\.(?P<split>train|valid|test)\.tsv(\.gz|\.xz|\.zst)?")


class LocalFile(Config):
    """A file of pairs (``source`` and ``target``) or of one language's text (``language``)."""

    path: str
    source: str = ""
    target: str = ""
    language: str = ""
    licence: str = "not stated"

    @model_validator(mode="after")
    def _is_one_kind(self) -> "LocalFile":
        if self.language and (self.source or self.target):
            raise ValueError("either language (text) or source and target (pairs), not both")
        return self


class LocalFiles(TextSource):
    """Pairs and texts from the user's files."""

    files: tuple[LocalFile, ...]

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:  # noqa: ARG002
        source_files = []
        for file in self.files:
            path = Path(file.path)
            codes = [
                resolve_language(x).code for x in (file.source, file.target, file.language) if x
            ]
            if not path.is_file() and not any(moses_file(path, code=c) for c in codes):
                raise DataError(f"{path}: no such file (nor {path.name}.<language> beside it)")
            source_files.append(SourceFile(path.name, path, licence=file.licence))
        return tuple(source_files)

    def inputs(self) -> tuple[Path, ...]:
        found = []
        for file in self.files:
            path = Path(file.path)
            sides = (
                moses_file(path, code=resolve_language(x).code)
                for x in (file.source, file.target)
                if x
            )
            found += [path] if path.is_file() else [side for side in sides if side]
        return tuple(found)

    def read(self, source_file: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair | Text]:
        for file in self.files:
            if Path(file.path) == source_file.path:
                yield from _read_local_file(file, wanted=wanted)


def _read_local_file(file: LocalFile, *, wanted: LanguageFilter) -> Iterator[Pair | Text]:
    if file.language:
        if wanted(resolve_language(file.language).code):
            yield from read_texts(file.path, code=file.language, licence=file.licence)
        return
    rows = read_pairs(file.path, source=file.source, target=file.target, licence=file.licence)
    for pair in rows:
        if wanted(pair.source_language) and wanted(pair.target_language):
            yield pair


class PresplitFolder(TextSource):
    """A folder of ``LANG.train.tsv.xz``, ``LANG.valid.tsv.xz``: domain, English, target per line.

    Its split is kept: train rows stay in train, the others are divided between valid and test. The
    domain (a package) is each pair's origin.
    """

    folder: str

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:  # noqa: ARG002
        root = Path(self.folder)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        source_files = []
        for path in sorted(root.iterdir()):
            match = _SPLIT_FILE.fullmatch(path.name)
            if match:
                split: AllowedSplit = "train" if match["split"] == "train" else "held-out"
                source_files.append(
                    SourceFile(resolve_language(match["language"]).code, path, allowed_split=split)
                )
        if not source_files:
            raise DataError(f"{root}: no file named LANG.train.tsv, .tsv.gz, .tsv.xz or .tsv.zst")
        return tuple(source_files)

    def inputs(self) -> tuple[Path, ...]:
        root = Path(self.folder)
        return tuple(sorted(p for p in root.glob("*") if _SPLIT_FILE.fullmatch(p.name)))

    def read(self, source_file: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair]:
        if not wanted(source_file.name):
            return
        rows = require_rows(
            read_rows(source_file.path, columns=3), path=source_file.path, what="pairs"
        )
        for row in rows:
            domain, english, target = row.fields[:3]
            yield Pair(english, target, ENGLISH, source_file.name, domain, "not stated")
