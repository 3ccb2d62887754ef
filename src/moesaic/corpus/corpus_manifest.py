"""The manifest of a corpus, ``corpus.json``: its fields, checked before any of them is used."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from moesaic.core.errors import ConfigError, DataError, printable
from moesaic.core.file_reader import (
    MIB,
    Count,
    FileEntry,
    FileKind,
    FileShape,
    parse_json,
    parse_shape,
    read_bytes,
    require_inside,
)
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.split import SPLITS
from moesaic.corpus.text_rules import SoftwareStrings, TextRules

CORPUS_FORMAT = 1
CORPUS_MANIFEST = "corpus.json"
CORPUS_MANIFEST_FILE = FileKind(
    name="manifest of a corpus",
    max_bytes=256 * MIB,  # a corpus of 100,000 files lists each
    max_values=10_000_000,
    error=DataError,
    way_out="build it again",
)
_SPLIT_NAME = re.compile(r"[A-Za-z][\w-]*")


class _Shape(FileShape):
    kind: ClassVar[FileKind] = CORPUS_MANIFEST_FILE


class CorpusFileEntry(FileEntry):
    """A file of the corpus: rows, size and hash."""

    rows: Count


class SplitEntry(_Shape):
    """Pairs of a split of a direction, and characters and words of each side."""

    pairs: Count
    source_characters: Count
    target_characters: Count
    source_words: Count
    target_words: Count


class DirectionEntry(_Shape):
    """A direction: its codes, rows read, rows dropped by reason, and counts by split."""

    source: str
    target: str
    rows_read: Count = Field(alias="read")
    dropped: dict[str, Count]
    splits: dict[str, SplitEntry]

    @property
    def kept(self) -> int:
        return sum(part.pairs for part in self.splits.values())


class TextEntry(_Shape):
    """Text in one language: rows read, dropped by reason, and kept by split.

    ``domains`` has the documents of each domain by split.
    """

    rows_read: Count = Field(alias="read")
    dropped: dict[str, Count]
    splits: dict[str, Count]
    domains: dict[str, dict[str, Count]] = Field(default_factory=dict)

    @property
    def kept(self) -> int:
        return sum(self.splits.values())


class SourceEntry(_Shape):
    """An origin: versions and licences of what was read, pairs and texts that are kept."""

    version: str
    licence: str
    pairs: Count
    texts: Count = 0


class CorpusManifest(_Shape):
    """The fields of corpus.json; those that earlier versions did not write have defaults."""

    format: int
    name: str = Field(pattern=r"^[\w-][\w.-]*$")
    recipe: dict[str, Any]
    inputs: dict[str, list[int]] = Field(default_factory=dict)
    languages: list[str]
    pairs: Count
    directions: list[DirectionEntry]
    texts: dict[str, TextEntry] = Field(default_factory=dict)
    domains: dict[str, list[str]] = Field(default_factory=dict)
    too_small: dict[str, Count]
    reasons: dict[str, str]
    sources: dict[str, SourceEntry]
    files_read: list[dict[str, str]] = Field(default_factory=list, alias="read")
    missing: dict[str, str] = Field(default_factory=dict)
    empty: dict[str, str] = Field(default_factory=dict)
    files: dict[str, CorpusFileEntry]

    def problems(self) -> Iterator[str]:
        """Yield what does not fit together: languages, directions, splits."""
        known = set(self.languages)
        for code in known:
            if resolve_language(code).code != code:
                yield f"languages: found {printable(code)}, expected a code such as deu_Latn"
        splits = {*SPLITS, *self.domains}
        for name in self.domains:
            if name in SPLITS or not _SPLIT_NAME.fullmatch(name):
                yield f"domains: found {printable(name)}, expected the name of a split"
        for entry in self.directions:
            direction = printable(f"{entry.source}-{entry.target}")
            if not known.issuperset((entry.source, entry.target)):
                yield f"directions: {direction} has a language that the corpus does not have"
            if entry.splits.keys() != splits:
                yield f"directions: {direction} has other splits than the corpus"
        for code, entry in self.texts.items():
            if entry.splits.keys() != splits:
                yield f"texts: {printable(code)} has other splits than the corpus"


def recorded_text_rules(recipe: Mapping[str, Any]) -> TextRules:
    """Return the text rules in a recipe; earlier versions, which wrote none, had one kind.

    Raises ConfigError: something else is written there.
    """
    clean = recipe.get("clean")
    written = clean.get("text_rules") if isinstance(clean, dict) else None
    return SoftwareStrings() if written is None else TextRules.from_dict(written)


def read_corpus_manifest(folder: Path) -> CorpusManifest:
    """Read and check the manifest of a corpus directory.

    Raises DataError: no corpus, another format, wrong fields, files that are missing, of another
    size, or outside of the directory.
    """
    path = folder / CORPUS_MANIFEST
    if not path.exists():
        raise DataError(
            f"{folder}: no corpus here ({CORPUS_MANIFEST} is missing); build one with "
            "`moesaic data build`"
        )
    data = read_bytes(path, CORPUS_MANIFEST_FILE)
    written = parse_json(data, kind=CORPUS_MANIFEST_FILE, where=path)
    found = written.get("format") if isinstance(written, dict) else "no format"
    if found != CORPUS_FORMAT:
        expected = f"expected {CORPUS_FORMAT}; build it again"
        raise DataError(f"{folder}: corpus format {printable(str(found))}, {expected}")
    manifest = parse_shape(data, CorpusManifest, kind=CORPUS_MANIFEST_FILE, where=path)
    try:
        problem = next(manifest.problems(), "")
        recorded_text_rules(manifest.recipe)
    except (DataError, ConfigError) as error:
        problem = str(error)
    if problem:
        raise CORPUS_MANIFEST_FILE.problem(path, problem)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    return manifest


def _check_file(folder: Path, name: str, entry: CorpusFileEntry) -> None:
    path = require_inside(folder, name, kind=CORPUS_MANIFEST_FILE, where=folder / CORPUS_MANIFEST)
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise DataError(f"{path}: missing; build the corpus again")
    if found != entry.bytes:
        raise DataError(
            f"{path}: {found} bytes, expected {entry.bytes}: cut short or altered; "
            "build the corpus again"
        )
