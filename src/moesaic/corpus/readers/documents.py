"""Documents: the texts that a language model is trained on, from text files and JSONL files.

A document is a text of any length with its lines: a whole file, a line, a paragraph, or the text of
a JSON object.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core.config import Choice
from moesaic.core.errors import DataError
from moesaic.corpus.languages import find_language
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.compressed import open_bytes
from moesaic.corpus.readers.jsonl import read_objects
from moesaic.corpus.readers.plain_text import SNIFFED_BYTES, refused_by_content
from moesaic.corpus.readers.text_lines import (
    decode_utf8,
    read_lines,
    replace_lone_surrogates,
)

_MAX_KEYS = 8  # in an error
_BINARY = ("a compiled", "a document or", "a picture", "compressed data")


@dataclass(frozen=True, slots=True)
class RawDocument:
    """A document as its file has it; the language and the label are empty where it states none."""

    text: str
    language: str = ""
    label: str = ""


class DocumentUnit(Choice):
    """Family: what one document of a plain text file is. Each line of a .jsonl file is one."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[str]:
        """Yield the documents of a text file. Raises DataError naming file and line."""


class WholeFile(DocumentUnit):
    """A file is one document."""

    def read(self, path: Path) -> Iterator[str]:
        with open_bytes(path) as stream:
            raw = stream.read(limits.MAX_DOCUMENT_BYTES + 1)
        if len(raw) > limits.MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{path}: {_too_long()}; divide it, or say what a document of this file is: "
                "document: EachParagraph or EachLine"
            )
        yield decode_utf8(raw, path=path)


class EachLine(DocumentUnit):
    """A line that is not blank is a document."""

    def read(self, path: Path) -> Iterator[str]:
        for number, line in read_lines(path):
            yield _checked(line, where=f"{path}, line {number}")


class EachParagraph(DocumentUnit):
    """Documents are separated by one or several blank lines."""

    def read(self, path: Path) -> Iterator[str]:
        lines: list[str] = []
        size = 0
        for number, line in read_lines(path):
            if line.strip():
                lines.append(line)
                size += len(line) + 1
                if size > limits.MAX_DOCUMENT_BYTES:  # before the lines of a whole file are kept
                    raise DataError(f"{path}, line {number}: {_too_long()} without a blank line")
            elif lines:
                yield _checked("\n".join(lines), where=f"{path}, line {number}")
                lines, size = [], 0
        if lines:
            yield _checked("\n".join(lines), where=str(path))


@dataclass(frozen=True, slots=True)
class JsonFields:
    """The keys of a JSON object's text, language and label; the last two may be empty: none."""

    text: str = "text"
    language: str = ""
    label: str = ""


def read_text_documents(path: Path, *, unit: DocumentUnit) -> Iterator[RawDocument]:
    """Yield the documents of a text file, blank ones left out; .gz .xz .zst too.

    Raises DataError: not UTF-8 (with the line), not text, or a document of more than
    ``MAX_DOCUMENT_BYTES``.
    """
    with open_bytes(path) as stream:
        found = refused_by_content(stream.read(SNIFFED_BYTES))
    if found is not None and found.name.startswith(_BINARY):
        raise DataError(f"{path}: {found.name}, expected plain text in UTF-8")
    for text in unit.read(path):
        if text.strip():
            yield RawDocument(text)


def read_json_documents(path: Path, *, fields: JsonFields) -> Iterator[RawDocument]:
    """Yield the document of each JSON object of a .jsonl file, one on a line.

    Raises DataError with file and line: no such key, a value that is no text, an unknown language.
    """
    for number, value in read_objects(path):
        where = f"{path}, line {number}"
        text = _checked(_field(value, fields.text, where=where), where=where)
        language = _field(value, fields.language, where=where) if fields.language else ""
        resolved = find_language(language) if language else None
        if language and resolved is None:
            raise DataError(
                f'{where}: "{fields.language}" is {language[:40]!r}, expected a language such as '
                "deu_Latn or de"
            )
        label = _field(value, fields.label, where=where) if fields.label else ""
        yield RawDocument(text, resolved.code if resolved else "", label)


def _field(value: Mapping[str, Any], key: str, *, where: str) -> str:
    if key not in value:
        names = ", ".join(name[:40] for name in list(value)[:_MAX_KEYS])
        raise DataError(
            f'{where}: no key "{key}", found {names or "an empty object"}; name the key of the '
            "text, the language or the domain in the recipe (text_field, language_field, "
            "DomainOfField)"
        )
    found = value[key]
    if not isinstance(found, str):
        raise DataError(f'{where}: "{key}" is of type {type(found).__name__}, expected a text')
    return replace_lone_surrogates(found)


def _checked(text: str, *, where: str) -> str:
    # a character has at most four bytes: most texts need no count
    if len(text) * 4 > limits.MAX_DOCUMENT_BYTES:
        size = len(text.encode(errors="replace"))
        if size > limits.MAX_DOCUMENT_BYTES:
            raise DataError(f"{where}: {_too_long()}; divide it")
    return text


def _too_long() -> str:
    return f"more than {limits.as_size(limits.MAX_DOCUMENT_BYTES)}, the limit of a document"
