"""Rows arrive grouped by expert and return to their tokens."""

import torch

from moesaic.moe.dispatcher import Dispatcher, LocalDispatcher
from moesaic.moe.router_context import RouterContext
from moesaic.moe.select import TopK

T, E, D = 20, 5, 4


def test_rows_are_grouped_by_expert():
    routing = TopK(k=2)(RouterContext.from_logits(torch.randn(T, E)))
    x = torch.randn(T, D)
    parcel = LocalDispatcher().dispatch(x, routing)
    start = 0
    for expert, count in enumerate(parcel.groups.rows_per_expert.tolist()):
        tokens = routing.token[routing.expert == expert]
        assert torch.equal(parcel.rows[start : start + count], x[tokens])
        start += count


def test_what_is_sent_comes_home_weighted():
    routing = TopK(k=2)(RouterContext.from_logits(torch.randn(T, E)))
    x = torch.randn(T, D)
    dispatcher = LocalDispatcher()
    assert isinstance(dispatcher, Dispatcher)
    parcel = dispatcher.dispatch(x, routing)
    torch.testing.assert_close(dispatcher.combine(parcel.rows, parcel), x)  # weights sum to one
