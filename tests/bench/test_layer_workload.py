"""Shapes have names or five numbers, and a skewed load is the load that was asked for."""

import pytest
import torch

from moesaic.bench.layer_workload import LAYER_SHAPES, LayerShape, parse_shape, zipf_bias
from moesaic.core.errors import UserError


def test_a_shape_is_a_name_or_five_numbers():
    assert parse_shape("a") is LAYER_SHAPES["A"]
    assert parse_shape("64, 32,48,8,2") == LayerShape(64, 32, 48, 8, 2)
    assert parse_shape(str(LAYER_SHAPES["D"])) == LAYER_SHAPES["D"]


@pytest.mark.parametrize("text", ["Z", "1,2,3", "1,2,3,4,0", "1,2,3,x,1", "8,8,8,4,5", ""])
def test_what_is_no_shape_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"2048,512,1408,8,2|at most"):
        parse_shape(text)


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (64, 6), (4, 1)])
def test_zipf_gives_each_expert_its_share(experts, k):
    logits = torch.randn(4000, experts)
    chosen = (logits + zipf_bias(logits, k=k)).topk(k).indices.flatten()
    load = torch.bincount(chosen, minlength=experts) / 4000
    share = 1 / torch.arange(1.0, experts + 1)
    want = (share / share.sum() * k).clamp(max=1.0)
    assert load[0] > 0.9 * want[0]
    below = want < 1
    order = load[below][:4]
    assert (order.diff() <= 0.02).all()
    assert float(load[-1]) == pytest.approx(float(want[-1]), rel=0.5)


def test_what_is_kept_is_x_and_two_hidden_widths_per_row():
    assert LayerShape(10, 3, 5, 4, 2).min_saved_values == 10 * 3 + 2 * 10 * 2 * 5
