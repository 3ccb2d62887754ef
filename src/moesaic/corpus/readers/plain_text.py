"""Formats that are not lines of plain text, recognised by suffix or by their first bytes.

A catalogue, subtitle or markup file is neither trained on nor translated as lines: its keys, time
stamps and tags are no text.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.languages import find_language
from moesaic.corpus.readers.compressed import name_without_compression, open_bytes

SNIFFED_BYTES = 1 << 16
"""How many bytes of a beginning formats are recognised by."""
# a long text may have a time stamp or a line of a catalogue further on
_SNIFFED_OF_CORPUS = 1 << 12


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(starts)


def _matches(pattern: bytes) -> Callable[[bytes], bool]:
    found = re.compile(pattern, re.MULTILINE)
    return lambda head: found.search(head) is not None


def _is_json(head: bytes) -> bool:
    """Whether an object, or a list of objects or strings, is begun: not ``[1]`` or ``{name}``."""
    if re.match(rb'\{\s*"(?:[^"\\\n]|\\.){0,200}"\s*:|\[\s*[{\[]\s*"', head):
        return True
    if not re.match(rb'\[\s*"', head):
        return False
    try:
        return bool(json.loads(head))
    except (ValueError, RecursionError):
        return False


_SUFFIX_ALONE = _begins()  # with nothing, so never


@dataclass(frozen=True, slots=True)
class RefusedFormat:
    """A format whose files are not lines of text, recognised by suffix or first bytes."""

    name: str
    suffixes: tuple[str, ...]
    recognises: Callable[[bytes], bool] = _SUFFIX_ALONE


_XML = _matches(rb"\A<(?:\?xml\b|!DOCTYPE\b|!--)")
REFUSED_FORMATS = (
    RefusedFormat(
        "a PO catalogue",
        (".po", ".pot"),
        _matches(rb'^msgid(?:_plural)?[ \t]+"[^\n]*\n(?:"[^\n]*\n)*msg(?:str|id_plural)\b'),
    ),
    RefusedFormat(
        "a compiled catalogue (MO)",
        (".mo", ".gmo"),
        _begins(b"\xde\x12\x04\x95", b"\x95\x04\x12\xde"),
    ),
    RefusedFormat("an XLIFF file", (".xlf", ".xliff", ".sdlxliff", ".mqxliff", ".mxliff")),
    RefusedFormat("a TMX file", (".tmx", ".tbx"), _matches(rb"\A\s*<(?:tmx|martif)\b")),
    RefusedFormat(
        "JSON", (".json", ".jsonl", ".ndjson", ".arb", ".xcstrings", ".ipynb", ".json5"), _is_json
    ),
    RefusedFormat(
        "a subtitle file",
        (".srt", ".vtt", ".ass", ".ssa", ".sbv", ".ttml", ".dfxp", ".smi", ".lrc"),
        _matches(
            rb"\A\s*WEBVTT\b|\A\[Script Info\]"
            rb"|^\d+:\d\d:\d\d[,.]\d+[ \t]*(?:-->|,)[ \t]*\d+:\d\d:\d\d[,.]\d+"
        ),
    ),
    RefusedFormat(
        "HTML or XML",
        (
            *(".html", ".htm", ".xhtml", ".xml", ".svg", ".resx", ".resw", ".ts", ".dtd", ".rss"),
            *(".dita", ".fb2", ".plist", ".stringsdict", ".xslt", ".wsdl", ".vue"),
        ),
        lambda head: (
            _XML(head) or bool(re.match(rb"(?i)<(?:html|xliff|head|body|ts|resources)\b", head))
        ),
    ),
    RefusedFormat(
        "a resource file of a program",
        (
            *(".properties", ".strings", ".ftl", ".ini", ".cfg", ".toml", ".yaml", ".yml", ".rc"),
            *(".php", ".js", ".mjs", ".tsx", ".jsx", ".py", ".rb", ".java", ".kt", ".swift"),
            *(".desktop", ".qph", ".lang", ".csv", ".tsv", ".sql"),
        ),
    ),
    RefusedFormat(
        "a text with markup", (".md", ".markdown", ".rst", ".adoc", ".tex", ".mdx", ".org")
    ),
    RefusedFormat(
        "a document or an archive",
        (
            *(".pdf", ".docx", ".doc", ".odt", ".ods", ".odp", ".rtf", ".xlsx", ".xls", ".pptx"),
            *(".epub", ".zip", ".tar", ".7z", ".rar", ".qm", ".parquet", ".safetensors"),
        ),
        _begins(*(b"%PDF-", b"PK\x03\x04", b"{\\rtf", b"\x7fELF", b"\xd0\xcf\x11\xe0", b"PAR1")),
    ),
    RefusedFormat(
        "a picture or a recording",
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".ico", ".mp3", ".mp4", ".wav", ".ogg"),
        _begins(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"OggS"),
    ),
    RefusedFormat(
        "compressed data",
        (),
        _begins(b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"BZh"),
    ),
)


def refused_by_suffix(path: Path) -> RefusedFormat | None:
    """Return the format that a file's name says, without its compression; None for plain text."""
    name = name_without_compression(path).casefold()
    return next((known for known in REFUSED_FORMATS if name.endswith(known.suffixes)), None)


def refused_by_content(content: bytes) -> RefusedFormat | None:
    """Return the format that a content begins as; None for plain text."""
    head = content[:SNIFFED_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return next((known for known in REFUSED_FORMATS if known.recognises(head)), None)


def refused_by_name(path: Path, *, code: str) -> RefusedFormat | None:
    """Return the format that a name says; ``news.ts`` is also a text in Tsonga, ``tso_Latn``."""
    language = find_language(Path(name_without_compression(path)).suffix.removeprefix("."))
    return None if language and language.code == code else refused_by_suffix(path)


def require_plain_text(path: Path, *, code: str) -> None:
    """Raise DataError where a file is not lines of text in the language ``code``."""
    with open_bytes(path) as stream:
        head = stream.read(_SNIFFED_OF_CORPUS)
    found = refused_by_name(path, code=code) or refused_by_content(head)
    if found is not None:
        raise DataError(
            f"{path}: {found.name}, expected text in one language, one text on a line: its markup, "
            "keys and numbers would be read as text; read a file with both languages as pairs "
            "(give its source and target), or take the texts out"
        )
