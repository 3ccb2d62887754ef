"""Series: read from packages, cut into windows, normalised."""

import numpy as np
import pytest
import torch
from packages import write_packages

from moesaic.core.errors import DataError
from moesaic.data.row_loader import RowLoader, held_out_rows
from moesaic.data.series import PACKAGED_FILES, PackagedSeries, SyntheticSeries
from moesaic.data.series_rows import (
    SeriesRows,
    normalised_window,
)

ROWS = SeriesRows(source=SyntheticSeries(number=2, length=100), context=12, future=4)


def ignore(_: str) -> None:
    pass


def test_a_window_is_normalised_by_its_context_alone():
    window = np.array([1.0, 3.0, 1.0, 3.0, 50.0])
    assert normalised_window(window, context=4).tolist() == [-1, 1, -1, 1, 48]
    shifted = normalised_window(window * 1e6 + 7, context=4)
    assert shifted == pytest.approx(normalised_window(window, context=4))
    assert np.isfinite(normalised_window(np.zeros(4), context=3)).all()


def test_a_label_is_the_point_that_follows_its_position():
    batch = next(RowLoader(ROWS.open(ignore), rows=12, seed=1, prefetch=0))
    values, labels = batch.target.values[..., 0], batch.labels
    assert values.shape == labels.shape == (12, ROWS.positions)
    assert torch.equal(labels[:, :-1], values[:, 1:])
    assert batch.groups["domain"].bincount().tolist() == [4, 4, 4]


def test_held_out_windows_predict_only_points_after_all_training_points():
    data = ROWS.open(ignore)
    draws = held_out_rows(sizes=data.sizes("valid"), rows=None)
    batch = data.make_batch(draws, split="valid")
    predicted = batch.labels.isfinite()
    assert not predicted[:, : ROWS.context - 1].any()
    # the last fifth of each series, every point once
    assert int(predicted.sum()) == sum(len(s.values) // 5 for s in data.series)
    trained = max(data.sizes("train")) - 1 + ROWS.positions + 1
    assert trained == 80


def test_packaged_series_are_read_with_missing_points_filled(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    write_packages(tmp_path)
    found = PackagedSeries().read(ignore)
    assert {s.domain for s in found} == {f.domain for f in PACKAGED_FILES}
    assert all(np.isfinite(s.values).all() and len(s.values) >= 14 for s in found)
    assert found[0].values[3:6].tolist() == [3, 4, 5]  # the missing one is between its neighbours


def test_a_package_without_its_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    write_packages(tmp_path)
    for wheel in tmp_path.rglob("vega*.whl"):
        wheel.write_bytes(next(tmp_path.rglob("scikit*.whl")).read_bytes())
    with pytest.raises(DataError, match="found no vega_datasets"):
        PackagedSeries().read(ignore)
