"""Rows of a forecasting model: normalised windows of time series.

The last part of every series is held out: validation asks for points that are later than all
training points of that series. Letters: B rows, W points of a window, L points of a series.
"""

import hashlib

import numpy as np
import torch
from pydantic import Field

from moesaic.data.batch import Batch, InputRows
from moesaic.data.ragged import IntArray
from moesaic.data.row_loader import RowDataset, RowDraws, RowOrigin, RowSource
from moesaic.data.series import FloatArray, Notify, PackagedSeries, Series, SeriesSource

_LEAST_SCALE = 1e-3  # of the values: a constant context has no scale of its own


class SeriesRows(RowSource):
    """Windows of ``context + future`` points; the first ``context`` of them give the scale.

    A row is the window without its last point, its labels are the window without its first: the
    label of position t is the point that follows it (``Regression`` reads all horizons from
    them). A label is NaN where nothing is predicted: in validation, within the context. Rows of a
    batch alternate between the series; ``domain`` is a group label.
    """

    source: SeriesSource = PackagedSeries()
    context: int = Field(default=96, ge=2)
    future: int = Field(default=32, ge=1)
    held_out: float = Field(
        default=0.2, gt=0, lt=1, description="share of every series, its end, for validation"
    )

    @property
    def positions(self) -> int:
        return self.context + self.future - 1

    def open(self, notify: Notify) -> "SeriesDataset":
        return SeriesDataset(self, self.source.read(notify))


class SeriesDataset(RowDataset):
    """The windows of given series. Group g is series g."""

    def __init__(self, rows: SeriesRows, series: tuple[Series, ...]) -> None:
        self.rows, self.series = rows, series
        domains = tuple(dict.fromkeys(one.domain for one in series))
        self.labels = {"domain": domains}
        self.origins = [RowOrigin(s.name, s.licence, len(s.values)) for s in series]
        self._domain = np.array([domains.index(one.domain) for one in series])
        length = np.array([len(one.values) for one in series])
        # a series has at least one training window, of at least two points
        self._train = np.maximum((length * (1 - rows.held_out)).astype(np.int64), 2)
        self._length = length
        digest = hashlib.sha256(repr(rows.to_dict()).encode())
        for one in series:
            digest.update(one.values.tobytes())
        self.fingerprint = digest.hexdigest()

    def sizes(self, split: str) -> IntArray:
        if split == "train":
            return np.maximum(self._train - self._window, 0) + 1
        return -(-(self._length - self._train) // self.rows.future)

    def window(self, group: int, row: int, *, split: str) -> FloatArray:
        """Return the points of a window, at most W of them."""
        if split == "train":
            start, end = row, min(row + self._window, int(self._train[group]))
        else:
            future = int(self._train[group]) + row * self.rows.future
            start, end = max(future - self.rows.context, 0), future + self.rows.future
        return self.series[group].values[start:end]

    def make_batch(self, draws: RowDraws, *, split: str) -> Batch:
        windows = [
            normalised_window(self.window(g, r, split=split), context=self.rows.context)
            for g, r in zip(draws.group.tolist(), draws.row.tolist(), strict=True)
        ]
        width = max((len(window) for window in windows), default=1) - 1
        values = torch.zeros(len(windows), width)
        labels = torch.full((len(windows), width), float("nan"))
        for row, window in enumerate(windows):
            points = torch.from_numpy(window).float()
            values[row, : len(window) - 1] = points[:-1]
            first = 0 if split == "train" else min(self.rows.context, len(window)) - 1
            labels[row, first : len(window) - 1] = points[first + 1 :]
        lengths = torch.tensor([len(window) - 1 for window in windows], dtype=torch.long)
        return Batch(
            source=InputRows.empty(len(windows)),
            target=InputRows(values[..., None], lengths),
            labels=labels,
            groups={"domain": torch.from_numpy(self._domain[draws.group])},
            key=torch.from_numpy(draws.key.astype(np.int64)),
        )

    @property
    def _window(self) -> int:
        return self.rows.context + self.rows.future


def normalised_window(window: FloatArray, *, context: int) -> FloatArray:
    """Return the window with mean 0 and standard deviation 1 over its first ``context`` points.

    Instance normalisation as in RevIN and Time-MoE (2409.16040): scales do not differ between
    domains, and nothing of the future enters.
    """
    known = window[:context]
    scale = max(float(known.std()), _LEAST_SCALE * float(np.abs(known).max()), 1e-12)
    return (window - known.mean()) / scale
