"""Groups of rows of a test set that are scored apart, each beside all other rows.

``seen``: rows that were trained on. ``copied``: the reference equals the source, so that copying is
right by definition. ``marked``: the source has placeholders, tags or URLs. The scores of a group
are corpus scores of its rows alone, without intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.corpus.placeholders import placeholder_keys
from moesaic.evaluate.seen_rows import SeenRows
from moesaic.evaluate.testset import TestSet
from moesaic.evaluate.translation_metrics import CorpusMetric

Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A name and which rows are in the group, booleans [N]."""

    name: str
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Scores by system and metric: of the ``count`` rows of a group, and of the ``rest``."""

    count: int
    rest: int
    inside: dict[str, Scores]
    outside: dict[str, Scores]

    def to_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "rest": self.rest,
            "inside": _rounded(self.inside),
            "outside": _rounded(self.outside),
        }


def row_groups(test: TestSet, seen: SeenRows | None) -> list[RowGroup]:
    """Return the groups of a test set that have a row."""
    rows = zip(test.sources, test.references, strict=True)
    groups = [
        RowGroup("copied", np.array([a.strip() == b.strip() for a, b in rows])),
        RowGroup("marked", np.array([bool(placeholder_keys(text)) for text in test.sources])),
    ]
    if seen is not None:
        groups.insert(0, RowGroup("seen", seen.source))
    return [group for group in groups if group.rows.any()]


def score_groups(
    groups: Sequence[RowGroup],
    *,
    metrics: Sequence[CorpusMetric],
    statistics: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, GroupScores]:
    """Return the scores of each group; ``statistics`` [N, C] by system and metric name."""
    found = {}
    for group in groups:
        parts = []
        for rows in (group.rows, ~group.rows):
            parts.append(
                {
                    system: {m.name: float(m.score(by_name[m.name][rows].sum(0))) for m in metrics}
                    for system, by_name in statistics.items()
                }
                if rows.any()
                else {}
            )
        count = int(group.rows.sum())
        found[group.name] = GroupScores(count, len(group.rows) - count, *parts)
    return found


def _rounded(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    return {s: {name: round(v, 2) for name, v in found.items()} for s, found in scores.items()}
