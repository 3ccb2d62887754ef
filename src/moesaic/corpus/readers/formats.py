"""Choose a reader by a file's name; see each format's own file for its errors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers.gettext import CatalogueEntry, parse_mo, parse_po
from moesaic.corpus.readers.jsonl import read_jsonl_pairs, read_jsonl_texts
from moesaic.corpus.readers.moses import moses_file, read_moses
from moesaic.corpus.readers.text_lines import (
    decode_utf8,
    name_without_compression,
    read_all_bytes,
    read_lines,
    require_rows,
)
from moesaic.corpus.readers.tmx import read_tmx
from moesaic.corpus.readers.tsv import read_rows

PAIR_FORMATS = (".tsv", ".jsonl", ".po", ".mo", ".tmx")
TEXT_FORMATS = (".txt", ".jsonl")


def read_pairs(
    path: Path | str,
    *,
    source: str = "",
    target: str = "",
    origin: str = "",
    licence: str = "not stated",
) -> Iterator[Pair]:
    """Yield the pairs of a file: .tsv (first two columns), .jsonl, .po, .mo, .tmx; .gz .xz .zst.

    Any other path is a Moses prefix: ``news`` reads ``news.en`` and ``news.de``. ``source`` and
    ``target`` take any spelling; only .jsonl may name its languages itself. ``origin`` is by
    default the file's name. Raises DataError naming file and line.
    """
    where = Path(path)
    codes = tuple(resolve_language(x).code if x else "" for x in (source, target))
    kind = Path(name_without_compression(where)).suffix.casefold()
    if not all(codes) and kind != ".jsonl":
        raise DataError(f"{where}: say which languages it holds: source and target")
    rows = _pairs(where, kind=kind, source=codes[0], target=codes[1])
    for pair in require_rows(rows, path=where, what="pairs"):
        yield replace(pair, origin=origin or where.name, licence=licence)


def read_texts(
    path: Path | str, *, code: str, origin: str = "", licence: str = "not stated"
) -> Iterator[Text]:
    """Yield the texts of a file in one language: .jsonl objects, or lines of anything else."""
    where, known = Path(path), resolve_language(code).code
    kind = Path(name_without_compression(where)).suffix.casefold()
    if kind == ".jsonl":
        rows = read_jsonl_texts(where, code=known)
    else:
        rows = (Text(line, known) for _, line in read_lines(where) if line.strip())
    for text in require_rows(rows, path=where, what="text"):
        yield replace(text, origin=origin or where.name, licence=licence)


def _pairs(path: Path, *, kind: str, source: str, target: str) -> Iterator[Pair]:
    if kind == ".tsv":
        rows = read_rows(path, columns=2)
        return (Pair(r.fields[0], r.fields[1], source, target) for r in rows)
    if kind == ".jsonl":
        return read_jsonl_pairs(path, source=source, target=target)
    if kind == ".tmx":
        return read_tmx(path, source=source, target=target)
    if kind == ".mo":
        return _entries(
            parse_mo(read_all_bytes(path), name=str(path)), source=source, target=target
        )
    if kind == ".po":
        return _entries(
            parse_po(decode_utf8(read_all_bytes(path), path=path), name=str(path)),
            source=source,
            target=target,
        )
    if moses_file(path, code=source) or moses_file(path, code=target):
        return read_moses(path, source=source, target=target)
    if path.exists():
        known = ", ".join(PAIR_FORMATS)
        raise DataError(f'{path}: unknown format "{kind}": expected one of {known}')
    raise DataError(f"{path}: no such file, and no {path.name}.{source} beside it")


def _entries(entries: Iterator[CatalogueEntry], *, source: str, target: str) -> Iterator[Pair]:
    return (Pair(e.default or e.source, e.target, source, target) for e in entries)
