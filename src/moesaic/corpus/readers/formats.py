"""Reading files of pairs or texts: the format is chosen by the file's name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers.gettext import parse_mo, parse_po
from moesaic.corpus.readers.jsonl import read_jsonl_pairs, read_jsonl_texts
from moesaic.corpus.readers.moses import moses_file, read_moses
from moesaic.corpus.readers.text_lines import (
    name_without_compression,
    read_all_bytes,
    read_lines,
    require_rows,
)
from moesaic.corpus.readers.tmx import read_tmx
from moesaic.corpus.readers.tsv import read_rows

PAIR_FORMATS = (".tsv", ".jsonl", ".po", ".mo", ".tmx")


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
    ``target`` take any spelling; .jsonl lines may have their own. ``origin`` is by
    default the file's name. Raises DataError naming file and line.
    """
    where = Path(path)
    codes = tuple(resolve_language(x).code if x else "" for x in (source, target))
    kind = Path(name_without_compression(where)).suffix.casefold()
    if not all(codes) and kind != ".jsonl":
        raise DataError(f"{where}: its languages are needed: source and target")
    rows = _pairs(where, kind=kind, source=codes[0], target=codes[1])
    for pair in require_rows(rows, path=where, what="pairs"):
        yield replace(pair, origin=origin or where.name, licence=licence)


def read_texts(
    path: Path | str, *, code: str, origin: str = "", licence: str = "not stated"
) -> Iterator[Text]:
    """Yield the texts of a file in one language: .jsonl objects, or the lines of other files."""
    where, resolved = Path(path), resolve_language(code).code
    kind = Path(name_without_compression(where)).suffix.casefold()
    if kind == ".jsonl":
        rows = read_jsonl_texts(where, code=resolved)
    else:
        rows = (Text(line, resolved) for _, line in read_lines(where) if line.strip())
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
    if kind in (".mo", ".po"):
        parse = parse_mo if kind == ".mo" else parse_po
        entries = parse(read_all_bytes(path), name=str(path))
        return (Pair(e.source, e.target, source, target) for e in entries)
    if moses_file(path, code=source) or moses_file(path, code=target):
        return read_moses(path, source=source, target=target)
    if path.exists():
        known = ", ".join(PAIR_FORMATS)
        raise DataError(f'{path}: unknown format "{kind}": expected one of {known}')
    raise DataError(f"{path}: no such file, and no {path.name}.{source} beside it")
