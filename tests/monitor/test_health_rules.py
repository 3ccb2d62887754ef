import math
from dataclasses import replace

import numpy as np
import pytest

from moesaic.monitor.expert_usage import LayerUsage
from moesaic.monitor.health_rules import HEALTH_RULES, HealthState, LayerInterval
from moesaic.monitor.router_health import RouterHealthMonitor, summarize_health
from moesaic.monitor.router_settings import RouterSettings

LANGUAGES = ("deu_Latn", "ces_Latn", "ukr_Cyrl", "amh_Ethi")
SETTINGS = RouterSettings(
    LANGUAGES,
    top_k=1,
    balance_weight=0.01,
    z_weight=0.001,
    capacity_factor=1.25,
    balance_terms=("SwitchBalance(weight=0.01)", "RouterZLoss(weight=0.001)"),
    z_place=1,
)
EVEN = [100] * 8


def layer(loads=EVEN, *, dropped=(0, 0, 0, 0), **facts):
    """Loads spread evenly over four languages."""
    table = np.array(loads, dtype=np.int64)[:, None] * np.ones((1, 4), dtype=np.int64)
    return LayerUsage("encoder.3", table, np.array(dropped), **facts)


def check(*intervals, settings=SETTINGS):
    monitor = RouterHealthMonitor({"encoder.3": settings})
    findings = ()
    for interval in intervals:
        findings = monitor.check_interval([interval])
    return findings


def rules(*intervals, settings=SETTINGS):
    return {f.rule for f in check(*intervals, settings=settings)}


COLLAPSED = layer([0, 0, 0, 0, 0, 900, 2, 800])
MONOPOLY = replace(
    layer(), counts=np.array([[90, 90, 90, 4]] * 7 + [[4, 5, 6, 380]], dtype=np.int64)
)

CASES = {
    "collapsed": (COLLAPSED, HealthState.COLLAPSING, ["2/8 experts (5, 7 take 100%"]),
    "dead_experts": (layer([100] * 6 + [0, 0]), HealthState.DEAD, ["2/8", "(6, 7)"]),
    "no_tokens": (layer([0] * 8), HealthState.DEAD, ["no tokens"]),
    "capacity_overflow": (
        layer(dropped=(90, 90, 90, 90)),
        HealthState.OVERFLOW,
        ["drops 10%", "factor 1.25"],
    ),
    "late_drops": (
        layer(dropped=(30, 30, 30, 30), dropped_late=110),
        HealthState.OVERFLOW,
        ["92% of its drops", "by position", "RandomPriority"],
    ),
    "language_drops": (
        layer(dropped=(4, 4, 4, 300)),
        HealthState.OVERFLOW,
        ["drops 27% of amh_Ethi, 0% of the others"],
    ),
    "language_monopoly": (
        MONOPOLY,
        HealthState.SKEWED,
        ["expert 7", "amh_Ethi: it sends 93%", "temperature"],
    ),
    "uneven_load": (
        layer([400, 60, 60, 60, 60, 60, 60, 60]),
        HealthState.SKEWED,
        ["expert 0 has 3.9 times"],
    ),
    "not_finite": (layer(router_entropy=math.nan), HealthState.UNSTABLE, ["not finite"]),
    "exploding_logits": (
        layer(logit_rms=120.0),
        HealthState.UNSTABLE,
        ["size 120", "z-loss", "--set model.moe.balance.1.weight=0.003"],
    ),
    "saturated_router": (layer(router_entropy=0.004), HealthState.UNSTABLE, ["saturated", "0.004"]),
}


@pytest.mark.parametrize("rule", CASES)
def test_each_failure_is_named_with_its_layer_and_words(rule):
    interval, state, words = CASES[rule]
    found = {f.rule: f for f in check(interval, interval)}
    assert rule in found
    assert found[rule].state == state
    assert found[rule].layer == "encoder.3"
    for word in words:
        assert word in found[rule].sentence


@pytest.mark.parametrize(
    "rule", sorted(CASES.keys() - {"capacity_overflow", "late_drops", "language_drops"})
)
def test_one_failure_raises_one_alarm(rule):
    interval, _, _ = CASES[rule]
    assert rules(interval, interval) == {rule}


def test_a_falling_load_entropy_warns_before_the_collapse():
    loads = [[100 + 30 * i] * 3 + [100 - 16 * i] * 5 for i in range(6)]
    findings = check(*(layer(load) for load in loads))
    assert {f.rule for f in findings} == {"entropy_falling"}
    assert "fell from" in findings[0].text
    assert "entropy_falling" not in rules(*(layer(load) for load in reversed(loads)))


def test_a_router_that_never_chooses_is_traced_to_a_balance_loss_that_is_too_strong():
    strong = replace(SETTINGS, balance_weight=1.0)
    intervals = [layer(router_entropy=0.995)] * 8
    (finding,) = check(*intervals, settings=strong)
    assert finding.state == HealthState.UNIFORM
    assert "balance weight 1 outweighs the task" in finding.cause
    (finding,) = check(*intervals)
    assert "hardly learns" in finding.cause
    assert rules(*intervals[:4], settings=strong) == set()  # every router is uniform at first


@pytest.mark.parametrize("rule", ["collapsed", "dead_experts", "uneven_load"])
def test_a_missing_balance_loss_is_named_as_the_cause(rule):
    interval, _, _ = CASES[rule]
    (finding,) = check(interval, interval, settings=replace(SETTINGS, balance_weight=0.0))
    assert "weight is 0" in finding.cause
    assert "SwitchBalance(weight=0.01)" in finding.advice
    (finding,) = check(interval, interval)
    assert "0.01 is too weak" in finding.cause


def test_a_run_that_balances_by_bias_gets_no_advice_to_add_a_balance_loss():
    settings = replace(SETTINGS, balance_weight=0.0, bias_rate=0.001)
    (finding,) = check(COLLAPSED, COLLAPSED, settings=settings)
    assert "the bias moves 0.001 a step" in finding.cause
    assert "--set model.moe.balance.0.rate=0.003" in finding.advice
    assert "SwitchBalance" not in finding.sentence


def test_advice_names_the_balance_loss_that_the_layer_has():
    settings = replace(SETTINGS, balance_place=2, moe="model.decoder.moe")
    (finding,) = check(COLLAPSED, COLLAPSED, settings=settings)
    assert "--set model.decoder.moe.balance.2.weight=0.03" in finding.advice


def test_findings_of_a_stopped_run_last_until_two_good_intervals():
    (finding,) = check(COLLAPSED, COLLAPSED)
    monitor = RouterHealthMonitor({"encoder.3": SETTINGS})
    monitor.restore([finding])
    assert monitor.check_interval([layer()]) == (finding,)
    assert monitor.check_interval([layer()]) == ()


def test_drops_of_an_uneven_layer_are_traced_to_the_load():
    uneven = layer([200, 200, 40, 40, 40, 200, 40, 40], dropped=(50, 50, 50, 50))
    finding = next(f for f in check(uneven, uneven) if f.rule == "capacity_overflow")
    assert "uneven" in finding.cause


def test_a_missing_z_loss_is_named_as_the_cause():
    interval = layer(logit_rms=99.0)
    (finding,) = check(interval, interval, settings=replace(SETTINGS, z_weight=0.0))
    assert "no z-loss" in finding.cause


@pytest.mark.parametrize(
    ("interval", "settings"),
    [
        (layer(), SETTINGS),
        (layer([110, 90, 130, 70, 100, 95, 105, 100], dropped=(9, 8, 9, 8)), SETTINGS),
        (layer([100, 100]), replace(SETTINGS, top_k=2)),
        (layer([100, 100, 100]), replace(SETTINGS, top_k=2)),
        (layer([100]), SETTINGS),
        (layer([1, 0, 0, 0, 0, 0, 0, 0]), SETTINGS),
        (layer(router_entropy=0.6, logit_rms=3.0), SETTINGS),
    ],
    ids=["even", "chance", "all of 2", "2 of 3", "one expert", "few tokens", "known scales"],
)
def test_a_healthy_layer_raises_no_alarm(interval, settings):
    assert check(*[interval] * 9, settings=settings) == ()


def test_one_bad_interval_is_chance_two_are_a_finding():
    assert rules(layer(), COLLAPSED) == set()
    assert rules(layer(), COLLAPSED, layer(), COLLAPSED) == set()
    assert rules(layer(), COLLAPSED, COLLAPSED) == {"collapsed"}


def test_an_alarm_lasts_until_two_good_intervals():
    assert rules(COLLAPSED, COLLAPSED, layer()) == {"collapsed"}
    assert rules(COLLAPSED, COLLAPSED, layer(), COLLAPSED, layer()) == {"collapsed"}
    assert rules(COLLAPSED, COLLAPSED, layer(), layer()) == set()


def test_values_that_are_not_finite_are_reported_at_once():
    assert rules(layer(logit_rms=math.inf)) == {"not_finite"}


def test_layers_are_checked_apart_and_the_worst_comes_first():
    names = ("encoder.3", "decoder.1", "decoder.3")
    monitor = RouterHealthMonitor(dict.fromkeys(names, SETTINGS))
    bad = replace(CASES["uneven_load"][0], layer="decoder.1")
    for _ in range(2):
        findings = monitor.check_interval([layer(), bad, replace(COLLAPSED, layer="decoder.3")])
    assert [f.layer for f in findings] == ["decoder.3", "decoder.1"]
    assert [f.state for f in findings] == [HealthState.COLLAPSING, HealthState.SKEWED]
    assert summarize_health(findings) == (
        "layer decoder.3 collapsed to 2/8 experts (5, 7 take 100% of the edges) (+1 more)"
    )


def test_no_findings_are_healthy():
    assert summarize_health(()) == "healthy"


@pytest.mark.parametrize("rule", HEALTH_RULES, ids=lambda s: s.__name__)
def test_no_rule_fails_on_odd_counts(rule):
    empty = LayerUsage("x", np.zeros((4, 0), dtype=np.int64), np.zeros(0, dtype=np.int64))
    for odd in (layer([0] * 8), layer([5]), empty, layer([0] * 8, dropped=(500, 0, 0, 0))):
        rule(LayerInterval(odd, SETTINGS))


def test_a_null_expert_without_tokens_is_not_dead():
    null = layer([100] * 6 + [0, 0], num_null_experts=2)
    assert rules(null, null) == set()
    assert rules(layer([100] * 6 + [0, 0])) == set()
    dead = layer([100] * 5 + [0, 400, 0], num_null_experts=2)
    (finding,) = check(dead, dead)
    assert (finding.rule, finding.text) == (
        "dead_experts", "has 1/6 experts without a token (5)",
    )  # fmt: skip


def test_a_busy_null_expert_is_neither_uneven_load_nor_a_monopoly():
    busy = layer([100] * 7 + [900], num_null_experts=1)
    assert rules(busy, busy) == set()
    counts = busy.counts.copy()
    counts[7] = [0, 0, 0, 3600]
    taken = replace(busy, counts=counts)
    assert "language_monopoly" not in rules(taken, taken)


def test_a_router_that_chooses_null_experts_alone_is_reported():
    null = layer([4] * 6 + [0, 6000], num_null_experts=1)
    (finding,) = check(null, null)
    assert (finding.rule, finding.state) == ("mostly_null_experts", HealthState.COLLAPSING)
    assert "100% of its edges to null experts" in finding.text
    assert rules(layer([4] * 6 + [0, 6000]), layer([4] * 6 + [0, 6000])) == {"collapsed"}
