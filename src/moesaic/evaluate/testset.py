"""TestSet: sentences and their references in one direction, and where they came from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from moesaic.core.errors import DataError
from moesaic.data.corpus import Corpus
from moesaic.data.languages import resolve_language
from moesaic.data.pair import Pair
from moesaic.data.readers.files import read_pairs
from moesaic.data.readers.moses import read_aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class TestSet:
    """At least one sentence with its reference. ``of`` is how many there were before a limit."""

    __test__ = False  # pytest: a value, not a test

    name: str
    source: str
    target: str
    sources: tuple[str, ...]
    references: tuple[str, ...]
    total_count: int = 0

    @property
    def key(self) -> str:
        """How results are filed: the target, or the direction when it is not from English."""
        return self.target if self.source == "eng_Latn" else f"{self.source}-{self.target}"

    def __len__(self) -> int:
        return len(self.sources)


def testset_from_pairs(
    pairs: Iterable[Pair], *, name: str, source: str, target: str, limit: int | None = None
) -> TestSet:
    """Make a test set of pairs; ``limit`` keeps that many, the same ones every time.

    Raises DataError when there are none.
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


def testsets_from_corpus(
    corpus: Corpus,
    *,
    directions: Sequence[tuple[str, str]] | None = None,
    split: str = "test",
    limit: int | None = None,
) -> list[TestSet]:
    """Make a test set per direction (default: all stored ones that have rows in ``split``)."""
    wanted = corpus.directions if directions is None else directions
    sets = []
    for source, target in wanted:
        rows = corpus.iter_pairs(source, target, split=split)
        first = list(islice(rows, 1))
        if not first and directions is None:
            continue
        every = first + list(rows)
        name = f"{corpus.name} {split}"
        sets.append(testset_from_pairs(every, name=name, source=source, target=target, limit=limit))
    if not sets:
        raise DataError(f"corpus {corpus.name} has no {split} rows")
    return sets


def testset_from_file(path: Path | str, *, source: str, target: str, limit: int | None = None) -> TestSet:
    """Read one file of pairs, or a Moses prefix, whatever ``readers.files.read_pairs`` reads."""
    pairs = read_pairs(path, source=source, target=target)
    return testset_from_pairs(pairs, name=Path(path).name, source=source, target=target, limit=limit)


def testset_from_moses(
    source_file: Path | str,
    reference_file: Path | str,
    *,
    source: str,
    target: str,
    limit: int | None = None,
) -> TestSet:
    """Read two files, line against line. Raises DataError when one is longer."""
    first, second = Path(source_file), Path(reference_file)
    codes = resolve_language(source).code, resolve_language(target).code
    pairs = read_aligned(first, second, source=codes[0], target=codes[1])
    return testset_from_pairs(pairs, name=second.name, source=source, target=target, limit=limit)
