"""Whatever the files of a run hold, the report and a comparison are made, or refused in words."""

import json
import shutil

import pytest
from fake_run import write_fake_run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moesaic.evaluate.head_scores import HeadScore, HeadScores
from moesaic.evaluate.perplexity import DocumentLoss, PerplexitySummary, group_perplexities
from moesaic.report.comparison_page import write_comparison
from moesaic.report.html import tag
from moesaic.report.html_report import write_report
from moesaic.report.run_comparison import RunComparison

FILES = ("summary.json", "usage.json", "insight.json", "curve.json", "perplexity.json",
         "head-scores.json")  # fmt: skip
ODD = st.sampled_from(
    [
        None,
        True,
        7,
        -1,
        10**18,
        1e308,
        float("nan"),
        "",
        "\ud800",
        "<script>",
        [],
        [[]],
        {},
        {"": 0},
    ]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_fake_run(tmp_path_factory.mktemp("doors") / "run")
    curve = {
        "format": 1, "points": [{"step": 5, "chrf": {"score": 2.0}}],
        "baselines": {"copy": {"score": 1.0}},
    }  # fmt: skip
    (path / "curve.json").write_text(json.dumps(curve))
    losses = [DocumentLoss(9.0, 5, 7, "eng_Latn", domain) for domain in ("a", "b")]
    groups = group_perplexities(losses, resamples=10)
    PerplexitySummary("run", "test", 8, 4, groups).write(path / "perplexity.json")
    score = HeadScore(0.5, 0.4, 0.6, 7)
    HeadScores("test", {"loss": {"all": score, "class/a": score}}).write(path / "head-scores.json")
    return path


def _replace(value, choose):
    """Replace one value somewhere below ``value`` with an odd one."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[choose(st.integers(0, len(keys) - 1))]
    if isinstance(value[key], dict | list) and value[key] and choose(st.integers(0, 3)):
        _replace(value[key], choose)
    else:
        value[key] = choose(ODD)


@settings(
    derandomize=True, max_examples=40, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_report_is_made_whatever_one_value_of_a_file_is(run, data, name):
    path = run / name
    before = path.read_bytes()
    value = json.loads(before)
    _replace(value, data.draw)
    try:
        path.write_text(json.dumps(value))
        page = write_report(run).read_text(encoding="utf-8")
    finally:
        path.write_bytes(before)
    assert "<script>" not in page.replace('<script>"use strict"', "")
    assert page.rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "NaN"), ("summary.json", '{"languages": 7}'),
        ("summary.json", '{"systems": 3, "languages": {"a": {}}}'), ("summary.json", "[" * 5000),
        ("curve.json", '{"points": 7}'), ("curve.json", '{"points": [{"step": "x"}]}'),
        ("curve.json", "[" * 5000), ("insight.json", '{"format": 1, "layers": {"a": 3}}'),
        ("usage.json", "[" * 5000),
        ("metrics.jsonl", '{"step": 1, "train/loss": 1e308}\n{"step": 2, "train/loss": -1e308}\n'),
        ("metrics.jsonl", '{"step": 1' + "0" * 400 + ', "train/loss": 1}\n'),
    ],
)  # fmt: skip
def test_damaged_files_become_gaps_in_reports_and_comparisons(run, tmp_path, name, content):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / name).write_text(content)
    assert write_report(copy).read_text(encoding="utf-8").rstrip().endswith("</html>")
    comparison = RunComparison.read([run, copy])
    page = write_comparison(comparison, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Side by side" in page
    assert comparison.to_dict()["runs"] == ["run", "copy"]


def test_lone_surrogates_are_shown_as_escapes(run, tmp_path):
    shown = tag("p", "a \ud83d b", title="\udc00")
    assert str(shown) == '<p title="\\udc00">a \\ud83d b</p>'
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for name in ("summary.json", "curve.json", "usage.json"):
        text = (copy / name).read_text(encoding="utf-8")
        (copy / name).write_text(text.replace('"', '"\\ud83d', 40), encoding="utf-8")
    assert write_report(copy).read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_long_labels_of_bars_are_shortened_inside_the_picture(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    rows = [{"step": 1, "valid/loss/spa_Latn": 2.0, "valid/loss/deu_Latn_" + "x" * 60: 3.0}]
    (copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    page = write_report(copy).read_text(encoding="utf-8")
    assert "…</text>" in page
