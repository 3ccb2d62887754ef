"""Moses files: two plain files of equal length, ``corpus.en`` and ``corpus.de``, paired by line."""

from collections.abc import Iterator
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.languages import is_same_tag, resolve_locale
from moesaic.corpus.pair import Pair
from moesaic.corpus.readers.compressed import name_without_compression
from moesaic.corpus.readers.plain_text import require_plain_text
from moesaic.corpus.readers.text_lines import read_lines
from moesaic.corpus.readers.variants import WantedLanguage


def moses_file(prefix: Path, *, code: str) -> Path | None:
    """Return the file of a language: ``prefix.de``, ``prefix.deu_Latn.gz`` or another spelling.

    ``code`` may be any spelling; a file that has exactly this one wins over the code's others.
    """
    wanted = WantedLanguage.resolve(code)
    try:
        siblings = sorted(
            p for p in prefix.parent.iterdir() if p.name.startswith(f"{prefix.name}.")
        )
    except OSError:
        return None
    endings = ((name_without_compression(p)[len(prefix.name) + 1 :], p) for p in siblings)
    standard = (e for e in endings if is_same_tag(e[0], code) or resolve_locale(e[0]) is not None)
    return next(iter(wanted.select(standard)), None)


def read_moses(prefix: Path, *, source: WantedLanguage, target: WantedLanguage) -> Iterator[Pair]:
    """Yield the pairs of ``prefix.<source>`` and ``prefix.<target>``.

    Raises DataError when a file is missing or one is longer than the other.
    """
    paths = []
    for side in (source, target):
        path = moses_file(prefix, code=side.spelled)
        if path is None:
            raise DataError(
                f"{prefix}: no file for {side.code} beside it, expected e.g. {prefix}.{side.code}"
            )
        paths.append(path)
    yield from read_aligned(paths[0], paths[1], source=source.code, target=target.code)


def read_aligned(first: Path, second: Path, *, source: str, target: str) -> Iterator[Pair]:
    """Yield line n of the first file with line n of the second.

    Raises DataError when one is longer than the other, or not lines of plain text.
    """
    for path, code in ((first, source), (second, target)):
        require_plain_text(path, code=code)
    end = (0, None)
    left, right = read_lines(first), read_lines(second)
    while True:
        (number, a), (other, b) = next(left, end), next(right, end)
        if a is None and b is None:
            return
        if a is None or b is None:
            short, long, at = (first, second, other) if a is None else (second, first, number)
            more = sum(1 for _ in (left if a is not None else right))
            raise DataError(
                f"{short}: {at - 1} lines, but {long} has {at + more}: the two must match line by "
                "line; find the missing or extra line"
            )
        yield Pair(a, b, source, target)
