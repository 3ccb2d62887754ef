import re
from itertools import pairwise

import numpy as np
import pytest

from moesaic.report.charts import Dot, Series, bar_chart, dot_chart, line_chart, share_bar
from moesaic.report.cluster import cluster
from moesaic.report.heat import SHADES, HeatMap, dendrogram, legend, reach_of
from moesaic.report.scale import POINTS, Scale, bounds, short, thin, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.027), (-3, 980), (5, 5.2), (0, 3e6)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert all(low <= t <= high for t in found)
    steps = {round(b - a, 12) for a, b in pairwise(found)}
    assert len({f"{s:.9g}" for s in steps}) == 1


def test_scales_map_ends_to_ends_even_when_flat():
    scale = Scale(2.0, 4.0, 10.0, 30.0)
    assert (scale(2), scale(3), scale(4)) == (10, 20, 30)
    assert Scale(1.0, 1.0, 0.0, 9.0)(1) == 0
    assert bounds([float("nan")]) == bounds([0.0, 1.0])


def test_long_curves_are_thinned_by_means_and_lose_only_what_is_not_finite():
    x, y = thin(range(1000), [1.0] * 999 + [float("inf")])
    assert len(x) <= POINTS
    assert set(y) == {1.0}
    assert x[-1] == 998


def test_axis_numbers_are_short():
    assert [short(v) for v in (0, 12000, 2.5e6, 0.0015)] == ["0", "12k", "2.5M", "0.0015"]


def test_charts_have_titles_and_legends():
    curves = [Series("a", [1, 2], [3, 4]), Series("b", [1, 2], [1, 2], tint=1, dash=1)]
    drawn = line_chart(curves, title="Loss & more").text
    assert "<title>Loss &amp; more</title>" in drawn
    assert drawn.count('class="curve"') == 2
    assert ">a</li>" in drawn
    assert "ul" not in line_chart(curves[:1], title="one").text


def test_charts_without_values_say_so():
    empty = Series("a", [1.0], [float("nan")])
    assert "No values" in line_chart([empty], title="x").text
    assert "No values" in bar_chart([], title="x").text
    assert "nan" not in line_chart([empty, Series("b", [1], [2])], title="x").text


def test_a_dot_shows_its_interval_in_words():
    rows = [("German", [Dot(40.0, 38.0, 42.0), None])]
    drawn = dot_chart(rows, systems=["model", "copy"], title="t").text
    assert "German: 40.0 (38.0 to 42.0)" in drawn
    assert "translation" not in drawn
    assert share_bar([("a", 0.0, "0s"), ("b", 3.0, "3s")], title="t").text.count("cut") == 2


def test_shades_are_zero_at_the_fair_share_and_end_at_the_reach():
    share = np.array([[0.25, 1.0], [0.25, 0.0], [0.25, 0.0], [0.25, 0.0]])
    found = HeatMap("l", share, [0, 1], ["a", "b"], reach=1.0).shades()
    assert (found[:, 0] == 0).all()
    assert found[0, 1] == SHADES
    assert found[1, 1] == -SHADES


def test_the_reach_suits_what_is_shown():
    even, strong = np.full((4, 3), 0.25), np.eye(4)
    assert reach_of([even]) == 0.5
    assert reach_of([strong]) == 3
    assert "1.4× or more" in legend(0.5).text


def test_large_maps_stay_small():
    share = np.random.default_rng(0).dirichlet(np.ones(64) * 0.5, size=50).T
    drawn = HeatMap("l", share, range(50), ["x"] * 50).draw().text
    assert len(drawn) < 90_000


def test_tree_and_map_have_the_same_rows():
    distance = np.abs(np.arange(5.0)[:, None] - np.arange(5.0))
    tree = cluster(distance)
    names = [f"L{i}" for i in range(5)]
    height = re.search(r'height="(\d+)"', dendrogram(tree, names=names).text)
    other = HeatMap("l", np.full((2, 5), 0.5), tree.leaves, names).draw().text
    assert height is not None
    assert height[0] in other
