"""Replay: a forward pass that takes recorded routes instead of deciding.

For debugging (does a model differ, or only its routing?), for distillation along a teacher's
routes, and for reinforcement learning where training must go the way that serving went.

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
    """Inside, the MoE layers of ``model`` route as recorded; layers without a record decide.

    Edges and weights are the recorded ones (so no gradient reaches a router through them); losses
    and logits are the router's own. Raises UserError, in the pass, for other tokens than those
    recorded.
    """
    wanted = {found.layer: found for found in routes}
    handles = [
        layer.router.register_forward_hook(_ReplayHook(wanted[layer.name]), with_kwargs=True)
        for layer in moe_layers(model)
        if layer.name in wanted
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class _ReplayHook:
    """A forward hook of a router that puts the recorded edges in the place of its own."""

    routes: LayerRoutes

    def __call__(
        self, router: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any], said: RouterOutput
    ) -> RouterOutput:
        del router, args
        recorded = self.routes.routing
        if said.routing.num_experts != recorded.num_experts:
            raise UserError(
                f"layer {self.routes.layer}: its routes were recorded with "
                f"{recorded.num_experts} experts, the model has {said.routing.num_experts}"
            )
        if not self._same_tokens(named["context"]):
            raise UserError(
                f"layer {self.routes.layer}: its routes are those of other tokens "
                f"({len(self.routes.tokens)}) than this batch's "
                f"({said.routing.num_tokens}); replay each batch with its own routes"
            )
        return replace(said, routing=_to_device_of(recorded, said.routing.expert))

    def _same_tokens(self, context: TokenContext) -> bool:
        here = (context.token.cpu(), context.position.cpu(), context.row.cpu())
        tokens = self.routes.tokens
        return tokens.equal(replace(tokens, token=here[0], position=here[1], row=here[2]))


def _to_device_of(routing: Routing, where: Tensor) -> Routing:
    token, expert, weight = (
        part.to(where.device) for part in (routing.token, routing.expert, routing.weight)
    )
    return replace(routing, token=token, expert=expert, weight=weight)
