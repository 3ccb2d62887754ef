import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import pytest
from fake_run import SAMPLES, write_fake_run

from moesaic.core.errors import CheckpointError
from moesaic.evaluate.baselines import copy_source
from moesaic.evaluate.harness import EvaluationSettings, evaluate
from moesaic.evaluate.testset import TestSet
from moesaic.monitor.health_record import RecordedFinding, write_findings
from moesaic.monitor.health_rules import HealthFinding, HealthState
from moesaic.report.forgetting_section import forgetting_section
from moesaic.report.html_report import write_report
from moesaic.report.palette import PALETTE
from moesaic.report.report_inputs import ReportInputs

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x'"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def text(run):
    return write_report(run).read_text(encoding="utf-8")


class _Elements(HTMLParser):
    """Collects elements; fails on a wrong nesting."""

    def __init__(self):
        super().__init__()
        self.seen, self.open, self.scripts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def _parse(text):
    parser = _Elements()
    parser.feed(text)
    assert not parser.open
    return parser


def test_the_report_is_one_small_file_that_asks_for_nothing(run, text):
    assert len(text.encode()) < 1_500_000
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|url\(|<link|<img|<iframe", text)
    assert "default-src 'none'" in unescape(text)


def test_it_is_well_formed_and_every_chart_has_a_title(text):
    seen = _parse(text).seen
    charts = [attrs for tag, attrs in seen if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) > 10
    assert text.count("<title>") >= len(charts)


def test_the_headline_counts_the_languages_where_the_memory_is_better(text):
    assert "better than copying the source in 12 of 12 languages" in text
    assert re.search(r"translation memory in \d+ of 12 languages, worse in \d+ \(", text)
    assert "lead over memory" in text


def test_every_section_shows_its_content(text):
    for word in (
        "Japanese", "chrF++", "Loss, nats per token", "Last validation loss by target language",
        "encoder.3", "decoder.1", "Languages clustered by the similarity", "Time by phase",
        "The whole config", "SwitchBalance", "2.13.0", "There is no health.json", "tok:13a",
    ):  # fmt: skip
        assert word in text, word
    for rows in SAMPLES.values():
        assert rows[0][2] in text


def test_no_text_of_a_file_becomes_script(tmp_path):
    run = write_fake_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    german = summary["languages"]["deu_Latn"]
    german["name"] = ATTACK
    german["samples"][0] |= {"source": ATTACK, "model": ATTACK, "reference": ATTACK}
    german["samples"][0]["experts"]["source"]["tokens"][0] = ATTACK
    summary["notes"].append(ATTACK)
    summary["counts"][ATTACK] = ATTACK
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(json.dumps({"name": ATTACK}))
    rows = json.dumps({"step": 1, f"train/loss/{ATTACK}": 1.0}) + "\n"
    (run / "metrics.jsonl").write_text(rows * 2)
    usage = json.loads((run / "usage.json").read_text())
    usage["layers"][0]["layer"] = ATTACK
    (run / "usage.json").write_text(json.dumps(usage))
    insight = json.loads((run / "insight.json").read_text())
    insight["layers"][ATTACK] = insight["layers"].pop("encoder.1")
    insight["layers"][ATTACK]["typical"][0][0] = ATTACK
    (run / "insight.json").write_text(json.dumps(insight))
    page = write_report(run).read_text(encoding="utf-8")
    parsed = _parse(page)
    assert len(parsed.scripts) == 1
    assert "alert" not in parsed.scripts[0]
    assert all(tag != "img" for tag, _ in parsed.seen)
    assert not any(name.startswith("on") for _, attrs in parsed.seen for name in attrs)


@pytest.mark.parametrize("name", ["summary.json", "usage.json", "insight.json", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["missing", "damaged", "of another kind"])
def test_a_missing_file_is_reported_and_the_rest_is_shown(run, tmp_path, name, how):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    if how == "missing":
        (copy / name).unlink()
    else:
        (copy / name).write_text("{" if how == "damaged" else "[1, 2]")
    page = write_report(copy).read_text(encoding="utf-8")
    _parse(page)
    assert 'class="gap"' in page
    assert "The whole config" in page
    assert "Sample translations" in page
    assert "Router health" in page


def test_counts_of_an_older_run_are_found_under_their_old_name(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "usage.json").rename(copy / "routes.json")
    page = write_report(copy).read_text(encoding="utf-8")
    assert "Use of the experts of encoder.3 by language" in page


def test_directions_that_lost_beyond_their_interval_are_counted(tmp_path):
    def direction(low, high):
        scores = {name: {"chrf": {"score": 30.0}} for name in ("before", "model")}
        change = {"difference": (low + high) / 2, "low": low, "high": high}
        return {"name": "x", "count": 4, **scores, "differences": {"before": {"chrf": change}}}

    mean = direction(-2.0, -1.0)
    found = {
        "languages": {"a": direction(-3.0, -1.0), "b": direction(-1.0, 1.0)},
        "mean": {name: mean[name] for name in ("before", "model")},
        "mean_differences": mean["differences"],
    }
    inputs = ReportInputs(name="run", forgetting=found)
    assert "1 of 2 directions that were not tuned lost chrF++" in str(forgetting_section(inputs))


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("name: new\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "has not been evaluated yet" in page
    assert page.count('class="gap"') >= 4


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        write_report(tmp_path)


def test_a_real_evaluation_is_shown(tmp_path):
    (tmp_path / "config.yaml").write_text("name: real\n")
    test = TestSet(
        name="x", source="eng_Latn", target="deu_Latn",
        sources=("Open", "Close file"), references=("Öffnen", "Datei schließen"),
    )  # fmt: skip
    found = evaluate(
        {"model": lambda *_, **__: ["Öffnen", "Datei"], "copy": copy_source},
        tests=[test],
        settings=EvaluationSettings(resamples=50),
    )
    found.with_run_facts(run="real", counts={"parameters": 10}, seconds={"train": 2.0}).write(
        tmp_path / "summary.json"
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    _parse(page)
    assert "German" in page
    assert "Datei schließen" in page


def test_health_findings_are_sentences(tmp_path):
    run = write_fake_run(tmp_path / "run")
    finding = HealthFinding(
        "encoder.3", "collapsed", HealthState.COLLAPSING, "collapsed to 1/8 experts", "<b>", "--set"
    )
    write_findings(run / "health.json", [RecordedFinding(finding, 40, 90)])
    page = write_report(run).read_text(encoding="utf-8")
    assert "Steps 40 to 90: layer encoder.3 collapsed to 1/8 experts." in page
    assert "Likely cause: &lt;b&gt;. Try: --set." in page
    write_findings(run / "health.json", [])
    assert "found nothing wrong" in write_report(run).read_text(encoding="utf-8")


def test_a_run_without_a_record_of_findings_is_not_called_healthy(tmp_path):
    page = write_report(write_fake_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "found nothing wrong" not in page
    assert "no health.json" in page


def test_the_five_house_colours_stand_out_on_both_grounds():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in PALETTE:
        assert 1.05 / (luminance(colour.light) + 0.05) > 3, colour.name  # WCAG: graphics
        assert (luminance(colour.dark) + 0.05) / (luminance("#181d23") + 0.05) > 3, colour.name
