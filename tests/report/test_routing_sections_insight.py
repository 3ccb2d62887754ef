"""The report shows what routing depends on, when it settles, and which positions are dropped."""

import json
import re

import pytest
import torch
from fake_run import write_fake_run

from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import LayerRoutes, RoutedTokens
from moesaic.report.html_report import write_report


@pytest.fixture
def run(tmp_path):
    return write_fake_run(tmp_path / "run")


def section(run):
    page = write_report(run).read_text(encoding="utf-8")
    return re.search(r'<section id="insight">.*?</section>', page, re.S)[0]


def write_step(run, step, experts, *, layers=("encoder.1",), ids=None):
    count = len(experts)
    token = torch.arange(count) if ids is None else torch.tensor(ids)
    none = torch.zeros(count, dtype=torch.long)
    tokens = RoutedTokens(token, torch.arange(count), none, none)
    expert = torch.tensor(experts)[:, None]
    routing = Routing.from_topk(torch.ones(count, 1), expert=expert, num_experts=4)
    path = run / "learning" / f"step-{step:08d}.routes"
    with RoutesWriter(path, languages=("deu_Latn",)) as file:
        file.add([LayerRoutes(layer, routing, tokens) for layer in layers])


def curves(text, title):
    figure = next(f for f in text.split("<figure>") if f"<figcaption>{title}" in f)
    result = re.search(r'data-curves="(.*?)"', figure)[1].replace("&quot;", '"')
    return {curve["name"]: curve for curve in json.loads(result)}


def test_the_inputs_of_the_router_are_compared_with_chance(run):
    text = section(run)
    assert "its token explains up to 47% of it (in encoder.3)" in text
    assert "its position explains up to 4% of it" in text
    assert "encoder.3: 0.52" in text
    assert "decoder.1: 0.98" in text


def test_typical_tokens_are_shown_with_their_spaces(run):
    assert '<code class="token">word3</code>' in section(run)
    assert "\u2423of" in section(run)


def test_null_experts_have_their_own_label(run):
    result = json.loads((run / "insight.json").read_text())
    result["layers"]["encoder.1"]["null_experts"] = 2
    (run / "insight.json").write_text(json.dumps(result))
    text = section(run)
    assert "null expert 6" in text
    assert "null expert 7" in text
    assert "null expert 5" not in text


def test_without_drops_the_curves_are_simulated(run):
    drawn = curves(section(run), "Simulated share of edges")
    assert set(drawn) == {
        "encoder, first come", "encoder, at random", "decoder, first come", "decoder, at random",
    }  # fmt: skip
    rates = drawn["decoder, first come"]["y"]
    assert rates[-1] > 0.2 > 0.01 > rates[0]
    assert "Nothing was dropped in this run" in section(run)


def test_with_drops_the_curves_are_of_what_was_dropped(run):
    result = json.loads((run / "insight.json").read_text())
    for layer in result["layers"].values():
        positions = layer["positions"]
        positions["dropped"] = [asked // 4 for asked in positions["asked"]]
    (run / "insight.json").write_text(json.dumps(result))
    drawn = curves(section(run), "Share of edges dropped")
    assert drawn["encoder, dropped"]["y"] == pytest.approx(
        [0.25] * len(drawn["encoder, dropped"]["y"]), abs=0.01
    )
    assert "simulated" not in section(run)


def test_the_agreement_of_each_step_with_the_last_is_a_curve(run):
    for step, experts in ((0, [0, 1, 2, 3]), (50, [0, 1, 0, 0]), (100, [0, 0, 0, 0])):
        write_step(run, step, experts)
    text = section(run)
    assert curves(text, "Share of edges as")["encoder.1"]["y"] == [0.25, 0.75, 1.0]
    assert "At step 50 of 100, 75% of the edges" in text
    assert "at step 0, 25%" in text


def test_many_layers_are_shown_by_their_median_and_extremes(run):
    for step in (0, 10):
        write_step(run, step, [step % 4] * 4, layers=[f"encoder.{i}" for i in range(7)])
    assert set(curves(section(run), "Share of edges as")) == {
        "median layer", "least settled layer", "most settled layer",
    }  # fmt: skip


def test_a_single_step_or_other_text_is_a_gap_with_the_way_out(run):
    assert "moesaic report RUN --checkpoints" in section(run)
    write_step(run, 0, [0, 1])
    assert "Only the routing of one step" in section(run)
    write_step(run, 9, [0, 1], ids=[7, 8])
    assert "on the same text" in section(run)


def test_a_run_without_evaluation_shows_the_command(run):
    (run / "insight.json").unlink()
    text = section(run)
    assert "There is no insight.json yet." in text
    assert "moesaic eval RUN" in text
