"""Input to translate: the lines of a file or stream, and the formats that are not plain lines.

Only "\\n" ends a line (with a "\\r" before it or not), as in the files that training reads: U+2028,
U+0085, form feeds or NUL stay within theirs, so that line i of the output belongs to line i of the
input. A catalogue, subtitle or markup file is refused: its markup is no text.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moesaic.core.errors import DataError
from moesaic.corpus.readers.compressed import open_bytes
from moesaic.corpus.readers.encodings import advise_encoding, looks_like_utf16
from moesaic.corpus.readers.text_lines import decode_utf8

MAX_INPUT_BYTES = 256 << 20
_SNIFFED = 1 << 16  # bytes at the beginning that a format is recognised by
_COMPRESSED = re.compile(r"\.(gz|xz|zst|bz2)$", re.IGNORECASE)


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


def _never(head: bytes) -> bool:  # noqa: ARG001
    return False


@dataclass(frozen=True, slots=True)
class RefusedFormat:
    """A format whose files are not lines of text, recognised by suffix or first bytes."""

    name: str
    suffixes: tuple[str, ...]
    recognises: Callable[[bytes], bool] = _never


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
            *(
                ".php",
                ".js",
                ".mjs",
                ".tsx",
                ".jsx",
                ".py",
                ".rb",
                ".java",
                ".kt",
                ".swift",
                ".desktop",
            ),
            *(".qph", ".lang", ".csv", ".tsv", ".sql"),
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
        _begins(b"%PDF-", b"PK\x03\x04", b"{\\rtf", b"\x7fELF", b"\xd0\xcf\x11\xe0", b"PAR1"),
    ),
    RefusedFormat(
        "compressed data",
        (),
        _begins(b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"BZh"),
    ),
)


def read_lines_to_translate(path: Path, *, as_text: bool = False) -> list[str]:
    """Return the lines of a file, decompressed by suffix.

    Raises DataError: not UTF-8 (with the line), or of one of ``REFUSED_FORMATS``, which ``as_text``
    reads as lines all the same.
    """
    with open_bytes(path) as stream:
        if not as_text:
            _refuse(_by_suffix(path), where=path)
        return read_stream_to_translate(stream, name=path, as_text=as_text)


def read_stream_to_translate(
    stream: BinaryIO, *, name: Path | str, as_text: bool = False
) -> list[str]:
    """Return the lines of a stream of bytes; errors call it ``name``. See the function above."""
    content = stream.read(MAX_INPUT_BYTES + 1)
    if len(content) > MAX_INPUT_BYTES:
        raise DataError(
            f"{name}: more than {MAX_INPUT_BYTES >> 20} MiB of text at once; translate it in parts"
        )
    if not as_text:
        head = content[:_SNIFFED].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
        found = next((known for known in REFUSED_FORMATS if known.recognises(head)), None)
        _refuse(found, where=name)
    if looks_like_utf16(content[:_SNIFFED].partition(b"\n")[0]):
        advice = advise_encoding(content[:_SNIFFED], at=0)
        raise DataError(f"{name}, line 1: not UTF-8 (it has a NUL beside each letter); {advice}")
    lines = decode_utf8(content, path=name).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _by_suffix(path: Path) -> RefusedFormat | None:
    name = _COMPRESSED.sub("", path.name).casefold()
    return next((known for known in REFUSED_FORMATS if name.endswith(known.suffixes)), None)


def _refuse(found: RefusedFormat | None, *, where: Path | str) -> None:
    if found is not None:
        raise DataError(
            f"{where}: {found.name}, expected plain text, one text on a line: its markup, keys and "
            "numbers would be translated as text. Take the texts out, one on a line, translate "
            "those, and put the translations back; or use --as-text (as_text=True) to translate "
            "every line as it is"
        )
