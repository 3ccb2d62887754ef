"""Reading files of pairs or texts: the format is chosen by the file's name."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers.compressed import COMPRESSED, name_without_compression
from moesaic.corpus.readers.gettext import CatalogueEntry, parse_mo, parse_po
from moesaic.corpus.readers.jsonl import read_jsonl_pairs, read_jsonl_texts
from moesaic.corpus.readers.moses import moses_file, read_moses
from moesaic.corpus.readers.plain_text import refused_by_name, require_plain_text
from moesaic.corpus.readers.text_lines import (
    read_all_bytes,
    read_lines,
    replace_lone_surrogates,
    require_rows,
)
from moesaic.corpus.readers.tmx import read_tmx
from moesaic.corpus.readers.tsv import read_user_rows
from moesaic.corpus.readers.variants import WantedLanguage

Wanted = WantedLanguage | None
PairReader = Callable[[Path, Wanted, Wanted], Iterator[Pair]]


def read_pairs(
    path: Path | str,
    *,
    source: str = "",
    target: str = "",
    origin: str = "",
    licence: str = "not stated",
) -> Iterator[Pair]:
    """Yield the pairs of a file: .tsv (first two columns), .jsonl, .po, .mo, .tmx, also compressed.

    Any other path is a Moses prefix: ``news`` reads ``news.en`` and ``news.de``. ``source`` and
    ``target`` take any spelling; .jsonl lines may have their own. ``origin`` is by
    default the file's name. Raises DataError naming file and line.
    """
    where = Path(path)
    sides = [WantedLanguage.resolve(x) if x else None for x in (source, target)]
    kind = Path(name_without_compression(where)).suffix.casefold()
    rows = PAIR_READERS.get(kind, _read_other)(where, sides[0], sides[1])
    named = replace_lone_surrogates(origin or where.name)
    for pair in require_rows(rows, path=where, what="pairs"):
        yield replace(pair, origin=named, licence=licence)


def read_texts(
    path: Path | str, *, code: str, origin: str = "", licence: str = "not stated"
) -> Iterator[Text]:
    """Yield the texts of a file in one language: .jsonl objects, or the lines of a text file.

    Raises DataError: a catalogue, subtitles, markup or another format of ``plain_text.py``.
    """
    where, resolved = Path(path), resolve_language(code).code
    if is_jsonl(where):
        rows = read_jsonl_texts(where, code=resolved)
    else:
        require_plain_text(where, code=resolved)
        rows = (Text(line, resolved) for _, line in read_lines(where) if line.strip())
    named = replace_lone_surrogates(origin or where.name)
    for text in require_rows(rows, path=where, what="text"):
        yield replace(text, origin=named, licence=licence)


def holds_texts(path: Path, *, code: str) -> bool:
    """Whether a file's name is that of .jsonl, or of a text file in a language."""
    return is_jsonl(path) or refused_by_name(path, code=code) is None


def is_jsonl(path: Path) -> bool:
    """Whether a file's name ends in .jsonl, compressed or not."""
    return name_without_compression(path).casefold().endswith(".jsonl")


def _both(path: Path, source: Wanted, target: Wanted) -> tuple[WantedLanguage, WantedLanguage]:
    if source is None or target is None:
        raise DataError(f"{path}: its languages are needed: source and target")
    return source, target


def _read_tsv(path: Path, source: Wanted, target: Wanted) -> Iterator[Pair]:
    left, right = _both(path, source, target)
    for row in read_user_rows(path, columns=2):
        yield Pair(row.fields[0], row.fields[1], left.code, right.code)


def _read_tmx(path: Path, source: Wanted, target: Wanted) -> Iterator[Pair]:
    left, right = _both(path, source, target)
    return read_tmx(path, source=left, target=right)


def _read_catalogue(path: Path, source: Wanted, target: Wanted) -> Iterator[Pair]:
    left, right = _both(path, source, target)
    is_text = name_without_compression(path).casefold().endswith(".po")
    for entry in (parse_po if is_text else parse_mo)(read_all_bytes(path), name=str(path)):
        if not isinstance(entry, CatalogueEntry):
            raise DataError(entry.problem)
        yield Pair(entry.source, entry.target, left.code, right.code)


def _read_other(path: Path, source: Wanted, target: Wanted) -> Iterator[Pair]:
    """Read Moses files, whose name has no suffix of a format."""
    left, right = _both(path, source, target)
    if any(moses_file(path, code=side.spelled) for side in (left, right)):
        return read_moses(path, source=left, target=right)
    if path.exists():
        known, packed = ", ".join(PAIR_FORMATS), " ".join(COMPRESSED)
        suffix = Path(name_without_compression(path)).suffix
        raise DataError(
            f'{path}: unknown format "{suffix}": expected one of {known} (also {packed})'
        )
    raise DataError(f"{path}: no such file, and no {path.name}.{left.code} beside it")


PAIR_READERS: dict[str, PairReader] = {
    ".tsv": _read_tsv,
    ".jsonl": read_jsonl_pairs,
    ".po": _read_catalogue,
    ".mo": _read_catalogue,
    ".tmx": _read_tmx,
}
"""The reader of each format of pairs, by suffix."""

PAIR_FORMATS = tuple(PAIR_READERS)
