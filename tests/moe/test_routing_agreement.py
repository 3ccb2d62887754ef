import pytest
import torch

from moesaic.core.errors import DataError
from moesaic.moe.routing import Routing
from moesaic.moe.routing_agreement import compare_routes
from moesaic.moe.routing_record import LayerRoutes, RoutedTokens


def routes(layer, *experts, num_experts=4, ids=None):
    expert = torch.tensor(experts)
    count = len(experts)
    token = torch.arange(count) if ids is None else torch.tensor(ids)
    tokens = RoutedTokens(
        token, torch.arange(count), torch.zeros(count).long(), torch.zeros(count).long()
    )
    weight = torch.full(expert.shape, 0.5)
    return LayerRoutes(
        layer, Routing.from_topk(weight, expert=expert, num_experts=num_experts), tokens
    )


def test_agreement_counts_edges_whatever_the_order_of_choices():
    left = [(routes("encoder.0", (0, 1), (2, 3), (1, 2)),)]
    right = [(routes("encoder.0", (1, 0), (2, 0), (0, 3)),)]
    (layer,) = compare_routes(left, right).layers
    assert layer.edges == pytest.approx(3 / 6)
    assert layer.tokens == pytest.approx(1 / 3)


def test_a_token_agrees_if_it_does_in_every_layer_of_its_side():
    left = [(routes("encoder.0", (0,), (1,)), routes("encoder.1", (0,), (1,)), routes("d.0", (3,)))]
    right = [
        (routes("encoder.0", (0,), (2,)), routes("encoder.1", (1,), (1,)), routes("d.0", (3,)))
    ]
    found = compare_routes(left, right)
    assert [layer.tokens for layer in found.layers] == [0.5, 0.5, 1.0]
    assert found.tokens == pytest.approx(1 / 3)
    assert found.edges == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_a_dropped_edge_agrees_with_nothing():
    left, right = [(routes("e.0", (4,), (1,)),)], [(routes("e.0", (4,), (4,)),)]
    (layer,) = compare_routes(left, right).layers
    assert (layer.edges, layer.tokens) == (0, 0.5)


def test_batches_add_up():
    one, other = (routes("e.0", (0,)),), (routes("e.0", (0,), (1,), (2,)),)
    moved = (routes("e.0", (0,), (2,), (1,)),)
    assert compare_routes([one, other], [one, moved]).edges == pytest.approx(2 / 4)


def test_other_text_is_refused():
    one = (routes("e.0", (0,)),)
    for other in ([(routes("e.0", (0,), ids=[9]),)], [(routes("e.1", (0,)),)], [one, one]):
        with pytest.raises(DataError, match="on the same text"):
            compare_routes([one], other)
