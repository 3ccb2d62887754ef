"""Your own files as a corpus: any mix of the formats that the readers know."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import model_validator

from moesaic.core.config import Config
from moesaic.core.errors import DataError
from moesaic.data.builders.source import ProgressListener, TextSource, SourceFile, LanguageFilter
from moesaic.data.languages import resolve_language
from moesaic.data.pair import Pair, Text
from moesaic.data.readers.files import read_pairs, read_texts
from moesaic.data.readers.moses import moses_file


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
    """Pairs and texts from files of your own."""

    files: tuple[LocalFile, ...]

    def fetch(self, *, progress: ProgressListener) -> tuple[SourceFile, ...]:
        del progress
        units = []
        for file in self.files:
            path = Path(file.path)
            codes = [resolve_language(x).code for x in (file.source, file.target, file.language) if x]
            if not path.is_file() and not any(moses_file(path, code=c) for c in codes):
                raise DataError(f"{path}: no such file (nor {path.name}.<language> beside it)")
            units.append(SourceFile(path.name, path, licence=file.licence))
        return tuple(units)

    def inputs(self) -> tuple[Path, ...]:
        found = []
        for file in self.files:
            path = Path(file.path)
            sides = (
                moses_file(path, code=resolve_language(x).code) for x in (file.source, file.target) if x
            )
            found += [path] if path.is_file() else [side for side in sides if side]
        return tuple(found)

    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair | Text]:
        for file in self.files:
            if Path(file.path) == unit.path:
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
