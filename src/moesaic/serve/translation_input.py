"""Input to translate: the lines of a file or stream, and the formats that are not plain lines.

Only "\\n" ends a line (with a "\\r" before it or not), or "\\r" where there is no "\\n" and it is
the last character, as in the files that training reads: U+2028, U+0085, form feeds or NUL stay
within theirs, so that line i of the output belongs to line i of the input. A catalogue, subtitle or
markup file is refused: its markup is no text.
"""

from pathlib import Path
from typing import BinaryIO

from moesaic.core.errors import DataError
from moesaic.corpus.readers.compressed import open_bytes
from moesaic.corpus.readers.encodings import advise_encoding, looks_like_utf16
from moesaic.corpus.readers.plain_text import (
    SNIFFED_BYTES,
    RefusedFormat,
    refused_by_content,
    refused_by_suffix,
)
from moesaic.corpus.readers.text_lines import decode_utf8

MAX_INPUT_BYTES = 256 << 20


def read_lines_to_translate(path: Path, *, as_text: bool = False) -> list[str]:
    """Return the lines of a file, decompressed by suffix.

    Raises DataError: not UTF-8 (with the line), or of a format of
    ``plain_text.REFUSED_FORMATS``, which ``as_text`` reads as lines all the same.
    """
    with open_bytes(path) as stream:
        if not as_text:
            _refuse(refused_by_suffix(path), where=path)
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
        _refuse(refused_by_content(content), where=name)
    if looks_like_utf16(content[:SNIFFED_BYTES].partition(b"\n")[0]):
        advice = advise_encoding(content[:SNIFFED_BYTES], at=0)
        raise DataError(f"{name}, line 1: not UTF-8 (it has a NUL beside each letter); {advice}")
    text = decode_utf8(content, path=name)
    if "\n" not in text and text.endswith("\r"):  # lines that end in CR, as corpora read them too
        text = text.replace("\r", "\n")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _refuse(found: RefusedFormat | None, *, where: Path | str) -> None:
    if found is not None:
        raise DataError(
            f"{where}: {found.name}, expected plain text, one text on a line: its markup, keys and "
            "numbers would be translated as text. Take the texts out, one on a line, translate "
            "those, and put the translations back; or use --as-text (as_text=True) to translate "
            "every line as it is"
        )
