"""Findings are recorded with the steps that they lasted."""

import json

import pytest

from moesaic.core.errors import DataError
from moesaic.monitor.health_record import (
    RecordedFinding,
    read_findings,
    record_findings,
    up_to_step,
    write_findings,
)
from moesaic.monitor.health_rules import HealthFinding, HealthState


def finding(layer="encoder.1", rule="collapsed", text="collapsed"):
    return HealthFinding(layer, rule, HealthState.COLLAPSING, text, "cause", "advice")


def test_a_finding_has_its_first_and_last_step():
    record = record_findings((), [finding()], step=10)
    record = record_findings(record, [finding(text="still"), finding("decoder.1")], step=20)
    record = record_findings(record, [finding("decoder.1")], step=30)
    record = record_findings(record, [finding(text="again")], step=40)
    assert [(r.finding.text, r.finding.layer, r.first_step, r.last_step) for r in record] == [
        ("collapsed", "encoder.1", 10, 30),
        ("collapsed", "decoder.1", 20, 40),
        ("again", "encoder.1", 40, None),
    ]
    assert up_to_step(record, 30) == (
        RecordedFinding(finding(), 10, 30),
        RecordedFinding(finding("decoder.1"), 20),
    )


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "health.json"
    assert read_findings(path) == ()
    record = (RecordedFinding(finding(), 10, 20), RecordedFinding(finding("decoder.0"), 30))
    write_findings(path, record)
    assert read_findings(path) == record


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "findings": []}', "[" * 9999, '{"format": 1}']
)
def test_another_file_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "health.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"health\.json"):
        read_findings(path)


@pytest.mark.parametrize(
    ("key", "value"), [("state", "fine"), ("text", 3), ("first_step", "x"), ("last_step", [])]
)
def test_a_wrong_field_is_refused(tmp_path, key, value):
    path = tmp_path / "health.json"
    write_findings(path, [RecordedFinding(finding(), 1)])
    content = json.loads(path.read_text())
    content["findings"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError):
        read_findings(path)
