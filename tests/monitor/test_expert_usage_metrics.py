import math

import numpy as np
import pytest

from moesaic.monitor.expert_usage import LayerUsage, summarize_load


def counts(*loads, dropped=0, **facts):
    table = np.array(loads, dtype=np.int64)[:, None]
    return LayerUsage("a", table, np.array([dropped]), **facts)


def test_a_balanced_layer_has_the_perfect_numbers():
    layer = counts(5, 5, 5, 5)
    assert (layer.max_vio, layer.min_load, layer.dead_experts, layer.drop_frac) == (0, 1, 0, 0)
    assert layer.load_entropy == pytest.approx(1)
    assert layer.effective_experts == pytest.approx(4)


def test_a_collapsed_layer_has_the_worst_numbers():
    layer = counts(20, 0, 0, 0)
    assert (layer.max_vio, layer.min_load, layer.dead_experts) == (3, 0, 3)
    assert layer.load_entropy == pytest.approx(0)
    assert layer.effective_experts == pytest.approx(1)


def test_numbers_follow_their_formulas():
    layer = counts(30, 10, dropped=10)
    assert layer.max_vio == pytest.approx(0.5)
    assert layer.drop_frac == pytest.approx(0.2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert layer.load_entropy == pytest.approx(entropy / math.log(2))


def test_a_layer_without_tokens_or_with_one_expert_has_numbers_too():
    assert counts(0, 0).max_vio == 0
    assert counts(0, 0).load_entropy == 0
    assert counts(7).load_entropy == 1


def test_a_row_holds_the_worst_layer():
    layers = [counts(5, 5), counts(10, 0, dropped=10, router_entropy=0.5), counts(0, 4)]
    row = summarize_load(layers)
    assert row["moe/max_vio"] == 1
    assert row["moe/dead_experts"] == 2
    assert row["moe/drop_frac"] == 0.5
    assert row["moe/router_entropy"] == 0.5
    assert "moe/logit_rms" not in row
    assert summarize_load([]) == {}


def test_null_experts_are_left_out_of_load_balance():
    counts = np.array([[30], [30], [30], [0], [110]])
    found = LayerUsage("x", counts, np.zeros(1, dtype=np.int64), num_null_experts=2)
    assert (found.max_vio, found.min_load, found.dead_experts) == (0.0, 1.0, 0)
    assert found.load_entropy == pytest.approx(1.0)
    assert found.null_expert_frac == pytest.approx(110 / 200)
    assert summarize_load([found])["moe/null_expert_frac"] == found.null_expert_frac
    assert "moe/null_expert_frac" not in summarize_load([LayerUsage("x", counts, np.zeros(1))])


def test_percentiles_are_over_the_layers():
    layers = [
        LayerUsage("x", np.array([[100 + n], [100 - n]]), np.zeros(1, dtype=np.int64))
        for n in (0, 10, 20, 30, 40)
    ]
    row = summarize_load(layers)
    assert row["moe/max_vio_p50"] == pytest.approx(0.2)
    assert row["moe/max_vio_p95"] == pytest.approx(0.38)
    assert row["moe/max_vio"] == pytest.approx(0.4)
