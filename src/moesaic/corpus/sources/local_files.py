"""Local files: the user's files in any format that readers support, and folders split already."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from moesaic.core.config import Config
from moesaic.core.errors import DataError
from moesaic.corpus.languages import ENGLISH, precise_tag, resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers.compressed import COMPRESSED, name_without_compression
from moesaic.corpus.readers.formats import PAIR_FORMATS, holds_texts, read_pairs, read_texts
from moesaic.corpus.readers.moses import moses_file
from moesaic.corpus.readers.text_lines import require_rows
from moesaic.corpus.readers.tsv import read_rows
from moesaic.corpus.sources.path_patterns import (
    FoundFile,
    find_user_files,
    nothing_found,
    require_readable,
)
from moesaic.corpus.sources.text_source import (
    AllowedSplit,
    LanguageFilter,
    Progress,
    SourceFile,
    TextSource,
)

_SPLIT_FILE = re.compile(r"(?P<language>.+)\.(?P<split>train|valid|test)\.tsv")
_NOT_STATED = "not stated"


class LocalFile(Config):
    """Files of pairs (``source`` and ``target``) or of one language's text (``language``).

    ``path`` is a file, a Moses prefix, a folder (every file of pairs below it) or a pattern:
    ``news/*.tsv``, ``news/{source}-{target}.tsv``, ``locale/{lang}/LC_MESSAGES/*.po``. ``{lang}``
    is the target where ``source`` is given, the source where ``target`` is given, else the language
    of a text. ``origin``, by default the path, names where the rows are from: in ``data stats``, in
    domains, and beside each pair.
    """

    path: str = Field(min_length=1)
    source: str = ""
    target: str = ""
    language: str = ""
    licence: str = _NOT_STATED
    origin: str = ""

    @model_validator(mode="after")
    def _is_one_kind(self) -> "LocalFile":
        if self.language and (self.source or self.target):
            raise ValueError("either language (text) or source and target (pairs), not both")
        return self

    def find(self) -> list[SourceFile]:
        """Return its files, each with its languages; a pattern's unfit ones with the reason."""
        if self._exists(Path(self.path)):
            found = [FoundFile(Path(self.path))]
        else:
            found = find_user_files(self.path, readable=self._is_readable)
        return [self._source_file(file) for file in found]

    def missing(self) -> DataError:
        """Return the error of a path without a file."""
        path = Path(self.path)
        if not path.is_dir() and (path.exists() or path.is_symlink()):
            return DataError(f"{path}: not a regular file (a device, a pipe or a link to nothing)")
        return nothing_found(
            self.path,
            kinds=["text"] if self.language else PAIR_FORMATS,
            expected=f"file (nor {path.name}.<language> beside it)",
        )

    def contradicts(self, other: SourceFile) -> bool:
        """Whether this entry states another licence or origin for the same file."""
        stated = [(self.origin, other.name)] if self.origin else []
        if self.licence != _NOT_STATED:
            stated.append((self.licence, other.licence))
        return any(mine != others for mine, others in stated)

    def _source_file(self, file: FoundFile) -> SourceFile:
        name = self.origin or printable_path(file.path)
        if file.problem:
            return SourceFile(printable_path(file.path), file.path, missing_reason=file.problem)
        tags = self._tags_of(file)
        languages = tuple(resolve_language(tag).code if tag else "" for tag in tags)
        reason = "both languages are the same" if len({*languages}) < len(languages) else ""
        if reason and not any(languages):
            reason = ""  # each line of a .jsonl file names its own
        return SourceFile(
            name,
            file.path,
            licence=self.licence,
            languages=languages,
            tags=tags,
            missing_reason=reason,
        )

    def _tags_of(self, file: FoundFile) -> tuple[str, ...]:
        given = {"source": self.source, "target": self.target, "lang": self.language}
        given = {place: precise_tag(text) for place, text in given.items() if text}
        for place, code in file.languages.items():
            if place in given:
                raise DataError(f"{self.path}: {place} is given by the path and by a key as well")
            given[place] = code
        if "lang" in given and ("source" in given or "target" in given):
            other = "target" if "source" in given else "source"
            if other in given:
                raise DataError(f"{self.path}: {{lang}}, source and target: one is too many")
            given[other] = given.pop("lang")
        if "lang" in given:
            return (given["lang"],)
        return given.get("source", ""), given.get("target", "")

    def _is_readable(self, path: Path) -> bool:
        if self.language:
            return holds_texts(path, code=resolve_language(self.language).code)
        return Path(name_without_compression(path)).suffix.casefold() in PAIR_FORMATS

    def _exists(self, path: Path) -> bool:
        tags = [precise_tag(x) for x in (self.source, self.target, self.language) if x]
        return path.is_file() or any(moses_file(path, code=tag) for tag in tags)


class LocalFiles(TextSource):
    """Pairs and texts from the user's files.

    A file that several entries find is read once for each pair of languages; an entry with its
    exact path decides about licence and origin before one with a pattern.
    """

    files: tuple[LocalFile, ...]

    @field_validator("files")
    @classmethod
    def _are_some(cls, files: tuple[LocalFile, ...]) -> tuple[LocalFile, ...]:
        if not files:
            raise ValueError(
                "no file is listed, expected e.g. {path: a.tsv, source: en, target: de}"
            )
        return files

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        by_entry = [(file, file.find()) for file in self.files]
        for file, files in by_entry:
            if not files:
                raise file.missing()
        found = _distinct_files(by_entry)
        licences: dict[str, SourceFile] = {}
        for source_file in require_readable(found, progress=progress):
            known = licences.setdefault(source_file.name, source_file)
            if known.licence != source_file.licence:
                raise DataError(
                    f"origin {known.name}: licence {known.licence} by {known.path}, "
                    f"{source_file.licence} by {source_file.path}; give them origins of their own"
                )
        return found

    def inputs(self) -> tuple[Path, ...]:
        found = []
        for source_file in _distinct_files([(file, file.find()) for file in self.files]):
            path = source_file.path
            sides = (moses_file(path, code=tag) for tag in source_file.tags if tag)
            found += [path] if path.is_file() else [side for side in sides if side]
        return tuple(dict.fromkeys(found))

    def read(self, source_file: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair | Text]:
        path, origin, licence = source_file.path, source_file.name, source_file.licence
        if len(source_file.languages) == 1:
            [code] = source_file.languages
            if wanted(code):
                yield from read_texts(path, code=code, origin=origin, licence=licence)
            return
        source, target = source_file.tags
        rows = read_pairs(path, source=source, target=target, origin=origin, licence=licence)
        for pair in rows:
            if wanted(pair.source_language) and wanted(pair.target_language):
                yield pair


def _distinct_files(by_entry: list[tuple[LocalFile, list[SourceFile]]]) -> tuple[SourceFile, ...]:
    """Return each file once per languages, in the order of the entries, exact paths deciding."""
    chosen: dict[tuple[Path, tuple[str, ...]], SourceFile] = {}
    exact: set[tuple[Path, tuple[str, ...]]] = set()
    for file, files in by_entry:
        for found in files:
            key = (found.path.resolve(), found.tags)
            is_exact = found.path == Path(file.path)
            if key not in chosen or (is_exact and key not in exact):
                chosen[key] = found
            elif is_exact and file.contradicts(chosen[key]):
                raise DataError(f"{found.path}: listed twice, with two licences or origins")
            if is_exact:
                exact.add(key)
    return tuple(chosen.values())


def printable_path(path: Path) -> str:
    """Return a path as one line of UTF-8: other bytes as U+FFFD, control characters as escapes."""
    text = os.fsencode(path.as_posix()).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


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
            match = _SPLIT_FILE.fullmatch(name_without_compression(path))
            if match:
                split: AllowedSplit = "train" if match["split"] == "train" else "held-out"
                try:
                    code = resolve_language(match["language"]).code
                except DataError as error:
                    raise DataError(f"{path}: {error}") from error
                source_files.append(SourceFile(code, path, allowed_split=split))
        if not source_files:
            packed = " ".join(COMPRESSED)
            raise DataError(f"{root}: no file named LANG.train.tsv (also {packed})")
        return tuple(source_files)

    def inputs(self) -> tuple[Path, ...]:
        root = Path(self.folder)
        found = (p for p in root.glob("*") if _SPLIT_FILE.fullmatch(name_without_compression(p)))
        return tuple(sorted(found))

    def read(self, source_file: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair]:
        if not wanted(source_file.name):
            return
        rows = require_rows(
            read_rows(source_file.path, columns=3), path=source_file.path, what="pairs"
        )
        for row in rows:
            domain, english, target = row.fields[:3]
            yield Pair(english, target, ENGLISH, source_file.name, domain, _NOT_STATED)
