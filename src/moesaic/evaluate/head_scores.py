"""Head scores: the loss and the metrics of a head on held-out rows, by label, with intervals.

For runs of any head: what validation reports, on a whole split and with 95 % intervals. A resample
draws predictions with replacement; those of one row stay together.

Letters: R resamples, N rows, K values of a prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.files import write_json

SCORES_FORMAT = 1


@dataclass(frozen=True, slots=True)
class HeadScore:
    """A mean over predictions, its 95 % interval, and the number of rows."""

    score: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True, slots=True)
class RowSums:
    """The summed values [K, N] and the number of predictions [N] of rows, and their labels.

    ``labels`` has each row's label by group, as text.
    """

    values: np.ndarray
    counts: np.ndarray
    labels: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class HeadScores:
    """Scores by value (``loss``, ``accuracy``), for all rows and by ``GROUP/LABEL``."""

    split: str
    scores: Mapping[str, Mapping[str, HeadScore]]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of head-scores.json."""
        scores = {
            name: {label: asdict(score) for label, score in by_label.items()}
            for name, by_label in self.scores.items()
        }
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return {
            "format": SCORES_FORMAT,
            "created": created,
            "split": self.split,
            "scores": scores,
        }

    def write(self, path: Path) -> None:
        """Write head-scores.json, whole or not at all."""
        write_json(path, self.to_dict())


def score_rows(rows: RowSums, *, names: Sequence[str], split: str, resamples: int) -> HeadScores:
    """Return the mean of each of the K values, named ``names``, of all rows and of each label."""
    members = {"all": np.ones(len(rows.counts), dtype=bool)}
    for group, labels in rows.labels.items():
        members |= {f"{group}/{label}": labels == label for label in np.unique(labels)}
    return HeadScores(
        split,
        {
            name: {
                label: _interval(rows.values[k][chosen], rows.counts[chosen], resamples)
                for label, chosen in members.items()
                if rows.counts[chosen].sum()
            }
            for k, name in enumerate(names)
        },
    )


def _interval(values: np.ndarray, counts: np.ndarray, resamples: int) -> HeadScore:
    """Return the mean per prediction, and the 2.5 and 97.5 percentiles over resampled rows."""
    random, number = np.random.default_rng(0), len(counts)
    drawn = random.integers(number, size=(resamples, number))
    total = np.maximum(counts[drawn].sum(1), 1)
    low, high = np.percentile(values[drawn].sum(1) / total, (2.5, 97.5))
    return HeadScore(float(values.sum() / counts.sum()), float(low), float(high), number)
