"""Document source: the user's text and JSONL files as documents to train a language model on."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import Field, field_validator

from moesaic.core.config import Choice, Config
from moesaic.core.errors import DataError
from moesaic.corpus.languages import UNDETERMINED, resolve_language
from moesaic.corpus.pair import Text
from moesaic.corpus.readers.compressed import name_without_compression
from moesaic.corpus.readers.documents import (
    DocumentUnit,
    JsonFields,
    RawDocument,
    WholeFile,
    read_json_documents,
    read_text_documents,
)
from moesaic.corpus.readers.formats import is_jsonl
from moesaic.corpus.readers.text_lines import require_rows
from moesaic.corpus.sources.local_files import printable_path
from moesaic.corpus.sources.path_patterns import (
    FoundFile,
    find_user_files,
    nothing_found,
    require_readable,
)
from moesaic.corpus.sources.text_source import LanguageFilter, Progress, SourceFile, TextSource
from moesaic.corpus.text_rules import DocumentText, TextRules

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")
"""Files below a folder that are read as documents."""

_MAX_LABEL = 80


class DomainRule(Choice):
    """Family: the domain of a document, a label by which losses and perplexities are grouped."""

    @property
    def field(self) -> str:
        """The key of the domain in a JSON object; empty for none."""
        return ""

    @abstractmethod
    def of(self, path: Path, document: RawDocument) -> str:
        """Return the domain of a document of the file ``path``; empty for none."""


class NoDomain(DomainRule):
    """Documents have no domain."""

    def of(self, path: Path, document: RawDocument) -> str:  # noqa: ARG002
        return ""


class NamedDomain(DomainRule):
    """All documents have the domain ``name``."""

    name: str = Field(min_length=1)

    def of(self, path: Path, document: RawDocument) -> str:  # noqa: ARG002
        return self.name


class DomainOfField(DomainRule):
    """The text under the key ``name`` of each JSON object."""

    name: str = Field(default="domain", min_length=1)

    @property
    def field(self) -> str:
        return self.name

    def of(self, path: Path, document: RawDocument) -> str:  # noqa: ARG002
        return document.label


class DomainOfFile(DomainRule):
    """The name of the file, without folder and suffixes."""

    def of(self, path: Path, document: RawDocument) -> str:  # noqa: ARG002
        return Path(name_without_compression(path)).stem


class DomainOfFolder(DomainRule):
    """The name of the folder that the file is in."""

    def of(self, path: Path, document: RawDocument) -> str:  # noqa: ARG002
        return path.absolute().parent.name


class DocumentFiles(Config):
    """Text and .jsonl files of documents: a file, a folder, or a pattern such as ``**/*.txt``.

    ``document`` is what one document of a text file is; a .jsonl file has one on a line, its text
    under ``text_field``, its language under ``language_field`` (empty: the language of the entry).
    A place ``{lang}`` in the path is a language too; without any, documents are of an undetermined
    language. ``origin``, by default the path, names where documents are from.
    """

    path: str = Field(min_length=1)
    document: DocumentUnit = WholeFile()
    text_field: str = Field(default="text", min_length=1)
    language_field: str = ""
    domain: DomainRule = NoDomain()
    language: str = ""
    licence: str = "not stated"
    origin: str = ""

    def find(self) -> list[SourceFile]:
        """Return its files, sorted by path. Raises DataError: none, or an unknown language."""
        if Path(self.path).is_file():
            found = [FoundFile(Path(self.path))]
        else:
            found = find_user_files(self.path, readable=_is_text_file)
        if not found:
            raise nothing_found(self.path, kinds=TEXT_SUFFIXES, expected="file or folder")
        return [self._source_file(file) for file in found]

    def read(self, source_file: SourceFile) -> Iterator[Text]:
        """Yield the documents of one of its files."""
        path, [default] = source_file.path, source_file.languages
        fields = JsonFields(self.text_field, self.language_field, self.domain.field)
        rows = (
            read_json_documents(path, fields=fields)
            if is_jsonl(path)
            else read_text_documents(path, unit=self.document)
        )
        for row in require_rows(rows, path=path, what="documents"):
            label = " ".join(self.domain.of(path, row).split())[:_MAX_LABEL]
            yield Text(
                row.text, row.language or default, source_file.name, source_file.licence, label
            )

    def _source_file(self, file: FoundFile) -> SourceFile:
        name = self.origin or printable_path(file.path)
        if file.problem:
            return SourceFile(name, file.path, missing_reason=file.problem)
        if self.language and "lang" in file.languages:
            raise DataError(f"{self.path}: the language is given by the path and by a key as well")
        code = resolve_language(self.language).code if self.language else UNDETERMINED
        code = file.languages.get("lang", code)
        return SourceFile(name, file.path, licence=self.licence, languages=(code,))


class Documents(TextSource):
    """Documents from the user's text and JSONL files, each file read once, by its first entry.

    Their text keeps its lines: a recipe that names no ``text_rules`` has ``DocumentText``.
    """

    files: tuple[DocumentFiles, ...]

    @field_validator("files")
    @classmethod
    def _are_some(cls, files: tuple[DocumentFiles, ...]) -> tuple[DocumentFiles, ...]:
        if not files:
            raise ValueError("no file is listed, expected e.g. {path: texts/*.txt}")
        return files

    @property
    def default_text_rules(self) -> TextRules:
        return DocumentText()

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        found = self._files()
        require_readable(found, progress=progress)
        return found

    def inputs(self) -> tuple[Path, ...]:
        return tuple(source_file.path for source_file in self._files())

    def read(self, source_file: SourceFile, *, wanted: LanguageFilter) -> Iterator[Text]:
        [number] = source_file.source_index
        for text in self.files[number].read(source_file):
            if wanted(text.language):
                yield text

    def _files(self) -> tuple[SourceFile, ...]:
        found: dict[Path, SourceFile] = {}
        for number, entry in enumerate(self.files):
            for source_file in entry.find():
                indexed = replace(source_file, source_index=(number,))
                found.setdefault(source_file.path.resolve(), indexed)
        return tuple(found.values())


def _is_text_file(path: Path) -> bool:
    return name_without_compression(path).casefold().endswith(TEXT_SUFFIXES)
