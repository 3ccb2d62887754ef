"""Test rows that the model was trained on: looked up among the train rows of its corpus.

A row is looked up exactly and by the corpus' split key (without case, punctuation, digits and
placeholders: ``corpus/split.py``), by which the corpus itself separates train from test. Only
64-bit hashes of the test set are kept in memory; the train rows are read once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moesaic.corpus.split import digest64, split_key
from moesaic.evaluate.testset import TestSet


@dataclass(frozen=True, slots=True)
class SeenRows:
    """Which rows of a test set are train rows, as booleans [N].

    ``exact``: the same source and target; ``normalised``: the same split keys of both; ``source``:
    the same split key of the source, with any translation. Each includes the one before.
    """

    exact: np.ndarray
    normalised: np.ndarray
    source: np.ndarray

    def sentence(self, test: TestSet) -> str:
        """Return a sentence with the three counts, or an empty text if there are none."""
        if not self.source.any():
            return ""
        total, near = int(self.source.sum()), int(self.normalised.sum() - self.exact.sum())
        others = total - int(self.normalised.sum())
        parts = [f"{int(self.exact.sum())} exactly"]
        parts += [f"{near} apart from case, punctuation and digits"] if near else []
        parts += [f"{others} with another translation of the same source"] if others else []
        return (
            f"{test.name}, {test.key}: {total} of {len(test)} rows were trained on "
            f"({', '.join(parts)})"
        )


def find_seen_rows(test: TestSet, train: Iterable[tuple[str, str]]) -> SeenRows:
    """Look the rows of a test set up among the (source, target) rows that were trained on."""
    rows = list(zip(test.sources, test.references, strict=True))
    exact = {_digest(*row): False for row in rows}
    pairs = {_digest(*map(split_key, row)): False for row in rows}
    sources = {_digest(split_key(source)): False for source, _ in rows}
    for source, target in train:
        key = split_key(source)
        digest = _digest(key)
        if digest not in sources:
            continue
        sources[digest] = True
        for table, found in (
            (exact, _digest(source, target)),
            (pairs, _digest(key, split_key(target))),
        ):
            if found in table:
                table[found] = True
    return SeenRows(
        exact=np.array([exact[_digest(*row)] for row in rows]),
        normalised=np.array([pairs[_digest(*map(split_key, row))] for row in rows]),
        source=np.array([sources[_digest(split_key(source))] for source, _ in rows]),
    )


def _digest(*texts: str) -> int:
    return digest64("\0".join(texts))
