"""Routing replay: a forward pass with recorded routes in place of the router's selection.

For debugging (does a model differ, or only its routing?), for distillation with a teacher's
routes, and for reinforcement learning where training must use the routes of serving.

Letters: T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from moesaic.core.errors import UserError
from moesaic.core.shapes import Tensor
from moesaic.moe.layer import moe_layers
from moesaic.moe.router import RouterOutput
from moesaic.moe.router_context import TokenContext
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import LayerRoutes


@contextmanager
def replay_routing(model: nn.Module, routes: Sequence[LayerRoutes]) -> Iterator[None]:
    """In this context, MoE layers of ``model`` with recorded routes use them.

    Other layers route as usual. Edges and weights are the recorded ones, so no gradient reaches a
    router through them; losses and logits are the router's own. The forward pass raises UserError
    for other tokens than those recorded.
    """
    recorded = {of_layer.layer: of_layer for of_layer in routes}
    handles = [
        layer.router.register_forward_hook(_ReplayHook(recorded[layer.name]), with_kwargs=True)
        for layer in moe_layers(model)
        if layer.name in recorded
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class _ReplayHook:
    """A forward hook of a router that replaces its edges by the recorded ones."""

    routes: LayerRoutes

    def __call__(
        self,
        _router: nn.Module,
        _args: tuple[Tensor, ...],
        keywords: dict[str, Any],
        output: RouterOutput,
    ) -> RouterOutput:
        recorded = self.routes.routing
        if output.routing.num_experts != recorded.num_experts:
            raise UserError(
                f"layer {self.routes.layer}: its routes were recorded with "
                f"{recorded.num_experts} experts, the model has {output.routing.num_experts}"
            )
        if not self._same_tokens(keywords["context"]):
            raise UserError(
                f"layer {self.routes.layer}: its routes are those of other tokens "
                f"({len(self.routes.tokens)}) than this batch's "
                f"({output.routing.num_tokens}); replay each batch with its own routes"
            )
        return replace(output, routing=_to_device_of(recorded, output.routing.expert))

    def _same_tokens(self, context: TokenContext) -> bool:
        token, position, row = (t.cpu() for t in (context.token, context.position, context.row))
        recorded = self.routes.tokens
        return recorded.equal(replace(recorded, token=token, position=position, row=row))


def _to_device_of(routing: Routing, like: Tensor) -> Routing:
    token, expert, weight = (
        part.to(like.device) for part in (routing.token, routing.expert, routing.weight)
    )
    return replace(routing, token=token, expert=expert, weight=weight)
