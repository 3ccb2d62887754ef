"""MoE layer: route, dispatch, experts, combine.

Letters: T tokens, D model dim.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.batch_group import BatchGroup, SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.dispatcher import Dispatcher, LocalDispatcher, WeightedInputs
from moesaic.moe.experts import ExpertShape
from moesaic.moe.null_experts import drop_null_edges
from moesaic.moe.router import Router
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.parameter_spec import FeedForwardShape


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """A sparse layer's output, its routing record (None without a router), and the router state."""

    out: Float[Tensor, "T D"]
    record: RoutingRecord | None
    router_state: RouterState


class MoELayer(nn.Module):
    """Router, dispatcher, experts, and the optional parts of the config.

    ``parallel/parallelize.py`` replaces ``dispatcher``, ``batch_group`` and the experts' weights.
    ``layer_index.name`` is the layer's name in records.
    """

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
        expert_dim = config.dispatch_projection.expert_dim(dim)
        self.router = Router(config, dim=dim, layer_index=layer_index)
        self.dispatch_projection = config.dispatch_projection.build(dim)
        self.experts = config.expert.build(ExpertShape(config.experts, expert_dim, feed, bias))
        self.shared_experts = config.shared_experts.build(FeedForwardShape(dim, feed, bias))
        self.null_experts, self.weights_on = config.null_experts, config.weights_on
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.batch_group: BatchGroup = SingleRankBatch()
        self.name = layer_index.name

    def forward(
        self, x: Float[Tensor, "T D"], *, context: TokenContext, router_state: RouterState
    ) -> MoEOutput:
        """Return the layer's output and its routing record. ``x`` has no padding tokens."""
        routed = self.router(
            x,
            context=context.for_layer(self.name),
            router_state=router_state,
            batch_group=self.batch_group,
        )
        nulls = self.null_experts.count()
        routing = drop_null_edges(routed.routing, num_null_experts=nulls)

        rows = x if self.dispatch_projection is None else self.dispatch_projection.down(x)
        # dispatch, experts, combine
        way = self.dispatcher if self.weights_on == "outputs" else WeightedInputs(self.dispatcher)
        y = way.run_experts(rows, routing=routing, experts=self.experts)
        if self.dispatch_projection is not None:
            y = self.dispatch_projection.up(y)

        if nulls:
            y = self.null_experts.add_output(y, x, routed.routing)
        if self.shared_experts is not None:
            y = self.shared_experts(x, routed_output=y)
        record = RoutingRecord(
            self.name,
            routed.routing,
            context,
            losses=routed.losses,
            logits=routed.logits,
            stats_vector=routed.stats_vector,
            num_null_experts=nulls,
        )
        return MoEOutput(y, record, routed.router_state)


def moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    """Yield the MoE layers of a model."""
    return (module for module in model.modules() if isinstance(module, MoELayer))


def accumulate_routing_stats(model: nn.Module, records: Iterable[RoutingRecord]) -> None:
    """Add a micro-batch to the statistics of the routers, once, after its backward pass."""
    stats = {record.layer: record.stats_vector for record in records}
    for layer in moe_layers(model):
        vector = stats.get(layer.name)
        if vector is not None:
            layer.router.accumulate_stats(vector)


def update_stateful_rules(model: nn.Module) -> None:
    """Update the stateful rules of all routers after an optimizer step."""
    for layer in moe_layers(model):
        layer.router.update_rules()


def reset_routing_stats(model: nn.Module) -> None:
    """Discard the routing statistics of a step that was not taken."""
    for layer in moe_layers(model):
        layer.router.reset_stats()
