"""The MoE layer. Read ``forward``; everything else is in the names it calls.

Letters: T tokens, D model dim.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.batch_group import BatchGroup, SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.dispatcher import Dispatcher, LocalDispatcher
from moesaic.moe.experts import ExpertShape
from moesaic.moe.null_experts import drop_null_edges
from moesaic.moe.router import Router
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_logits import LayerIndex
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.feed_forward import FeedForwardConfig


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """A layer's output, what its router did (None where there is none), and what is handed on."""

    out: Float[Tensor, "T D"]
    record: RoutingRecord | None
    router_state: RouterState


class MoELayer(nn.Module):
    """Router, dispatcher, experts. ``place.name`` is the layer's name in records."""

    def __init__(
        self,
        config: MoE,
        *,
        dim: int,
        feed_forward: FeedForwardConfig,
        bias: bool,
        layer_index: LayerIndex,
    ) -> None:
        super().__init__()
        feed = config.feed_forward(feed_forward)
        self.router = Router(config, dim=dim, layer_index=layer_index)
        self.dispatch_projection = config.dispatch_projection.build(dim=dim)
        self.experts = config.expert.build(
            ExpertShape(config.experts, config.dispatch_projection.expert_dim(dim), feed, bias)
        )
        self.shared_experts = config.shared_experts.build(feed_forward=feed, dim=dim, bias=bias)
        self.null_experts = config.null_experts
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.batch_group: BatchGroup = SingleRankBatch()
        self.name = layer_index.name

    def forward(
        self, x: Float[Tensor, "T D"], *, context: TokenContext, router_state: RouterState
    ) -> MoEOutput:
        """Return the experts' answer and what the router did. ``x`` holds real tokens only."""
        routed = self.router(
            x,
            context=context.for_layer(self.name),
            router_state=router_state,
            batch_group=self.batch_group,
        )
        spare = self.null_experts.count()
        edges = drop_null_edges(routed.routing, num_null_experts=spare)
        rows = self.dispatch_projection.project(x)
        home = self.dispatcher.run_experts(rows, routing=edges, experts=self.experts)
        mixed = self.null_experts.add_output(
            self.dispatch_projection.unproject(home), x=x, routing=routed.routing
        )
        out = self.shared_experts(x, routed_output=mixed)
        record = RoutingRecord.from_router(
            self.name, routed, context=context, num_null_experts=spare
        )
        return MoEOutput(out, record, routed.router_state)


def moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    """Yield the MoE layers of a model."""
    return (module for module in model.modules() if isinstance(module, MoELayer))


def set_ranks(model: nn.Module, ranks: BatchGroup) -> None:
    """Tell every MoE layer which ranks share its batch."""
    for layer in moe_layers(model):
        layer.batch_group = ranks


def set_dispatcher(model: nn.Module, dispatcher: Dispatcher) -> None:
    """Give every MoE layer the dispatcher that knows where its experts live."""
    for layer in moe_layers(model):
        layer.dispatcher = dispatcher


def accumulate_routing_stats(model: nn.Module, records: Iterable[RoutingRecord]) -> None:
    """Let the routers remember a micro-batch, once, after its backward pass."""
    sums = {record.layer: record.stats_vector for record in records}
    for layer in moe_layers(model):
        heard = sums.get(layer.name)
        if heard is not None:
            layer.router.accumulate_stats(heard)


def update_stateful_rules(model: nn.Module) -> None:
    """Let the rules of every router learn from an optimizer step that is done."""
    for layer in moe_layers(model):
        layer.router.update_rules()


def reset_routing_stats(model: nn.Module) -> None:
    """Let the routers forget a step that was not taken."""
    for layer in moe_layers(model):
        layer.router.reset_stats()
