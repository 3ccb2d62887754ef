"""The MoE layer. Read ``forward``; everything else is in the four names it calls.

Letters: T tokens, D model dim.
"""

from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.config import MoE
from moesaic.moe.dispatch import Dispatcher, LocalDispatcher
from moesaic.moe.experts import Experts
from moesaic.moe.record import Record
from moesaic.moe.reduce import LocalReduce, Reduce
from moesaic.moe.router import Router
from moesaic.nn.feed_forward import FeedForward


class MoELayer(nn.Module):
    """Router, dispatcher, experts. ``name`` is the layer's name in records."""

    def __init__(
        self, config: MoE, *, dim: int, feed_forward: FeedForward, bias: bool, name: str
    ) -> None:
        super().__init__()
        if config.hidden is not None:
            feed_forward = feed_forward.replace(hidden=config.hidden)
        self.router = Router(config, dim=dim)
        self.experts = Experts(feed_forward, num_experts=config.experts, dim=dim, bias=bias)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.reduce: Reduce = LocalReduce()
        self.name = name

    def forward(
        self, x: Float[Tensor, "T D"], *, row: Int[Tensor, "T"]
    ) -> tuple[Float[Tensor, "T D"], Record]:
        """Return the experts' answer and what the router did. ``x`` holds real tokens only."""
        routed = self.router(x, reduce=self.reduce)
        out = self.dispatcher.carry(x, routing=routed.routing, experts=self.experts)
        return out, Record(self.name, routed.routing, row, routed.losses, routed.logits)


def set_reduce(model: nn.Module, reduce: Reduce) -> None:
    """Give every MoE layer the sum of counters over the ranks that share its batch."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.reduce = reduce


def set_dispatcher(model: nn.Module, dispatcher: Dispatcher) -> None:
    """Give every MoE layer the dispatcher that knows where its experts live."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.dispatcher = dispatcher
