import importlib
import json
import math

import pytest

from moesaic.core.errors import UserError
from moesaic.monitor.metric_writers import JsonlWriter, MultiWriter, TensorBoardWriter, read_metrics


def written(path, steps):
    sink = JsonlWriter(path)
    for step in steps:
        sink.write(step, values={"train/loss": step / 3})
    sink.close()
    return path


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_rows_come_back_bit_for_bit_also_those_that_json_lacks(tmp_path):
    values = {"a": 0.1 + 0.2, "b": math.inf, "c": -math.inf, "d": math.nan}
    sink = JsonlWriter(tmp_path / "m.jsonl")
    sink.write(1, values=values)
    sink.close()
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert math.isnan(row.pop("d"))
    assert row == {"step": 1, "a": 0.1 + 0.2, "b": math.inf, "c": -math.inf}
    json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)


def test_truncating_deletes_later_steps_and_writing_continues_there(tmp_path):
    path = written(tmp_path / "m.jsonl", range(1, 11))
    sink = JsonlWriter(path)
    sink.write(11, values={})
    sink.truncate_after(4)
    sink.write(5, values={"train/loss": 9.0})
    sink.close()
    assert steps(path) == [1, 2, 3, 4, 5]


def test_resuming_gives_the_same_bytes_as_never_stopping(tmp_path):
    whole = written(tmp_path / "whole.jsonl", range(1, 8)).read_bytes()
    path = written(tmp_path / "m.jsonl", range(1, 6))
    sink = JsonlWriter(path)
    sink.truncate_after(3)
    for step in range(4, 8):
        sink.write(step, values={"train/loss": step / 3})
    sink.close()
    assert path.read_bytes() == whole


def test_a_last_line_cut_anywhere_is_dropped_and_no_other(tmp_path):
    path = written(tmp_path / "m.jsonl", range(1, 4))
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for size in range(second, len(whole)):
        path.write_bytes(whole[:size])
        assert steps(path)[:2] == [1, 2]  # a reader meets it too
        JsonlWriter(path).close()
        assert path.read_bytes() == whole[:second]


def test_rows_reach_every_sink_of_a_tee(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    tee = MultiWriter([JsonlWriter(p) for p in paths])
    tee.write(1, values={})
    tee.flush()
    assert [steps(p) for p in paths] == [[1], [1]]
    tee.close()
    MultiWriter().write(1, values={})


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    sink = TensorBoardWriter(tmp_path, purge_after=3)
    sink.write(4, values={"train/loss": 1.5})
    sink.close()
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = importlib.import_module(module).EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 1.5)]


def test_a_missing_tensorboard_is_reported_with_the_way_to_install_it(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'pip install "moesaic\[tb\]"'):
        TensorBoardWriter(tmp_path)
