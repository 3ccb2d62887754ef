"""Timelines: of a predicted step and of a measured one, as viewers read them."""

import json
from pathlib import Path

import pytest

from moesaic.checkpoint.run_directory import RunDir
from moesaic.monitor.chrome_trace import write_chrome_trace
from moesaic.planner.step_time import StepTime
from moesaic.planner.timeline import predicted_spans
from moesaic.testing.tiny_models import tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.run import LogConfig
from moesaic.train.timeline_hook import TimelineHook

TIME = StepTime({"dense product": 0.2, "attention": 0.1}, {"all-to-all expert": 0.05}, {}, 0.02)


def events(path: Path) -> list[dict]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def test_the_spans_of_a_predicted_step_follow_each_other_up_to_its_time(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    write_chrome_trace(path, predicted_spans(TIME), process="forecast")
    found = events(path)
    assert [event["name"] for event in found] == [
        *("dense product", "attention", "all-to-all expert", "optimizer"),
    ]
    ends = [event["ts"] + event["dur"] for event in found]
    assert [event["ts"] for event in found][1:] == pytest.approx(ends[:-1])
    assert abs(ends[-1] - 1e6 * TIME.total) < 1
    assert len({event["tid"] for event in found}) == 3


def test_a_step_is_recorded_with_its_operations(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    trainer = tiny_trainer(tiny_run(steps=3, log=LogConfig(timeline_step=2)))
    training_loop(trainer, hooks=[TimelineHook(run_dir)], until=3)
    (path,) = run_dir.timelines.iterdir()
    assert path.name == "step-00000002-rank-0.json"
    assert any("aten::" in event["name"] for event in events(path))
