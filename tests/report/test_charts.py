import re
from itertools import pairwise

import numpy as np
import pytest

from moesaic.report.charts import (
    MAX_POINTS,
    AxisScale,
    ChartSeries,
    IntervalDot,
    axis_range,
    bar_chart,
    dot_chart,
    format_tick,
    line_chart,
    stacked_bar,
    thin_curve,
    tick_values,
)
from moesaic.report.heat_map import (
    SHADES,
    ExpertHeatMap,
    average_linkage,
    choose_max_log2_ratio,
    dendrogram,
    heat_map_legend,
)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.027), (-3, 980), (5, 5.2), (0, 3e6)])
def test_ticks_are_few_round_and_inside(low, high):
    found = tick_values(low, high)
    assert 2 <= len(found) <= 9
    assert all(low <= t <= high for t in found)
    steps = {round(b - a, 12) for a, b in pairwise(found)}
    assert len({f"{s:.9g}" for s in steps}) == 1


def test_scales_map_ends_to_ends_even_when_flat():
    scale = AxisScale(2.0, 4.0, 10.0, 30.0)
    assert (scale(2), scale(3), scale(4)) == (10, 20, 30)
    assert AxisScale(1.0, 1.0, 0.0, 9.0)(1) == 0
    assert axis_range([float("nan")]) == axis_range([0.0, 1.0])


def test_long_curves_are_thinned_by_means_and_lose_only_what_is_not_finite():
    x, y = thin_curve(range(1000), [1.0] * 999 + [float("inf")])
    assert len(x) <= MAX_POINTS
    assert set(y) == {1.0}
    assert x[-1] == 998


def test_axis_numbers_are_short():
    assert [format_tick(v) for v in (0, 12000, 2.5e6, 0.0015)] == ["0", "12k", "2.5M", "0.0015"]


def test_charts_have_titles_and_legends():
    curves = [ChartSeries("a", [1, 2], [3, 4]), ChartSeries("b", [1, 2], [1, 2], color=1, dash=1)]
    drawn = line_chart(curves, title="Loss & more").text
    assert "<title>Loss &amp; more</title>" in drawn
    assert drawn.count('class="curve"') == 2
    assert ">a</li>" in drawn
    assert "ul" not in line_chart(curves[:1], title="one").text


def test_charts_without_values_have_a_note():
    empty = ChartSeries("a", [1.0], [float("nan")])
    assert "No values" in line_chart([empty], title="x").text
    assert "No values" in bar_chart([], title="x").text
    assert "nan" not in line_chart([empty, ChartSeries("b", [1], [2])], title="x").text


def test_a_dot_shows_its_interval_in_words():
    rows = [("German", [IntervalDot(40.0, 38.0, 42.0), None])]
    drawn = dot_chart(rows, systems=["model", "copy"], title="t").text
    assert "German: 40.0 (38.0 to 42.0)" in drawn
    assert "translation" not in drawn
    assert stacked_bar([("a", 0.0, "0s"), ("b", 3.0, "3s")], title="t").text.count("cut") == 2


def test_shades_are_zero_at_the_fair_share_and_end_at_the_reach():
    share = np.array([[0.25, 1.0], [0.25, 0.0], [0.25, 0.0], [0.25, 0.0]])
    found = ExpertHeatMap("l", share, [0, 1], ["a", "b"], max_log2_ratio=1.0).shades()
    assert (found[:, 0] == 0).all()
    assert found[0, 1] == SHADES
    assert found[1, 1] == -SHADES


def test_the_reach_suits_what_is_shown():
    even, strong = np.full((4, 3), 0.25), np.eye(4)
    assert choose_max_log2_ratio([even]) == 0.5
    assert choose_max_log2_ratio([strong]) == 3
    assert "1.4× or more" in heat_map_legend(0.5).text


def test_large_maps_stay_small():
    share = np.random.default_rng(0).dirichlet(np.ones(64) * 0.5, size=50).T
    drawn = ExpertHeatMap("l", share, range(50), ["x"] * 50).render().text
    assert len(drawn) < 90_000


def test_tree_and_map_have_the_same_rows():
    distance = np.abs(np.arange(5.0)[:, None] - np.arange(5.0))
    tree = average_linkage(distance)
    names = [f"L{i}" for i in range(5)]
    height = re.search(r'height="(\d+)"', dendrogram(tree, names=names).text)
    other = ExpertHeatMap("l", np.full((2, 5), 0.5), tree.leaves, names).render().text
    assert height is not None
    assert height[0] in other
