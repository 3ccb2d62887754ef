"""A record without losses has an empty dict of its own."""

import torch

from moesaic.moe.router_context import TokenContext
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import RoutingRecord


def test_records_do_not_share_losses():
    routing = Routing.from_topk(torch.ones(1, 1), expert=torch.zeros(1, 1).long(), num_experts=1)
    first, second = (
        RoutingRecord("encoder.1", routing, TokenContext.unbatched(1)) for _ in range(2)
    )
    assert first.losses == {}
    assert first.losses is not second.losses
