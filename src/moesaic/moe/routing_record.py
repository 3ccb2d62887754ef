"""Routing record: the losses, logits and edges of an MoE layer in one forward pass, and routes.

``RoutingRecord`` is returned with the layer's output. ``LayerRoutes`` is its detached copy on the
host: input of statistics, of routes files (``checkpoint/routes_file.py``) and of routing replay.

Letters: T tokens, B rows, E experts, S statistics.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.router_context import TokenContext
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """One layer's routing in one forward pass.

    ``losses`` holds the layer's weighted loss terms by name (``balance``, ``z``), scalars in the
    autograd graph; their sum is added to the training loss exactly once. They are this rank's
    *share* (see ``batch_group.py``) and exist in training only. ``context`` has the row, position
    and vocabulary id of each token of ``routing``, without padding. ``logits`` are the router's,
    detached; ``stats_vector`` are the routing statistics for the stateful rules. The last
    ``num_null_experts`` experts of ``routing`` are null experts.
    """

    layer: str
    routing: Routing
    context: TokenContext
    losses: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    logits: Float[Tensor, "T E"] | None = None
    stats_vector: Float[Tensor, "S"] | None = None
    num_null_experts: int = 0

    @property
    def row(self) -> Int[Tensor, "T"]:
        return self.context.row

    def detached(self) -> "RoutingRecord":
        """Return the record without the autograd graph, which holds a whole forward pass."""
        routing = replace(self.routing, weight=self.routing.weight.detach())
        losses = {name: value.detach() for name, value in self.losses.items()}
        return replace(self, routing=routing, losses=losses)

    def router_entropy(self) -> Float[Tensor, ""] | None:
        """Return the mean entropy of a token's expert probabilities, as a share of ``log E``."""
        if self.logits is None or self.logits.numel() == 0:
            return None
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean() / math.log(max(2, self.logits.shape[1]))

    def logit_rms(self) -> Float[Tensor, ""] | None:
        """Return the root mean square of the logits' logsumexp, which a z-loss reduces."""
        if self.logits is None or self.logits.numel() == 0:
            return None
        return self.logits.logsumexp(-1).square().mean().sqrt()


def loss_terms(
    records: Iterable[RoutingRecord], *, num_micro_batches: int
) -> dict[str, Float[Tensor, ""]]:
    """Add up the loss terms of one of several micro-batches, by name (``loss_balance``)."""
    terms: dict[str, Float[Tensor, ""]] = {}
    for record in records:
        for name, value in record.losses.items():
            terms[f"loss_{name}"] = terms.get(f"loss_{name}", 0.0) + value / num_micro_batches
    return terms


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """The routed tokens: vocabulary id, position in the row, row of the batch, and language index.

    All int64.
    """

    token: Int[Tensor, "T"]
    position: Int[Tensor, "T"]
    row: Int[Tensor, "T"]
    language: Int[Tensor, "T"]

    def __len__(self) -> int:
        return self.token.numel()

    def equal(self, other: "RoutedTokens") -> bool:
        """Whether they are the same tokens at the same positions."""
        pairs = ((self.token, other.token), (self.position, other.position), (self.row, other.row))
        return all(torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class LayerRoutes:
    """One layer's routing of one batch; its last ``num_null_experts`` experts are null experts."""

    layer: str
    routing: Routing
    tokens: RoutedTokens
    num_null_experts: int = 0

    @property
    def side(self) -> str:
        """``encoder`` or ``decoder``; layers of a side route the same tokens."""
        return self.layer.partition(".")[0]


def routes_from_records(
    records: Iterable[RoutingRecord], *, language: Int[Tensor, "B"]
) -> tuple[LayerRoutes, ...]:
    """Return the routes of a forward pass on the host; ``language`` is that of each row."""
    sides: dict[str, RoutedTokens] = {}
    routes = []
    for record in records:
        side = record.layer.partition(".")[0]
        if side not in sides:
            context, of_row = record.context, language.to(record.row.device)
            parts = (context.token, context.position, context.row, of_row[context.row])
            sides[side] = RoutedTokens(*(part.detach().cpu() for part in parts))
        routing, nulls = _detach_to_cpu(record.routing), record.num_null_experts
        routes.append(LayerRoutes(record.layer, routing, sides[side], nulls))
    return tuple(routes)


def _detach_to_cpu(routing: Routing) -> Routing:
    return replace(
        routing,
        token=routing.token.detach().cpu(),
        expert=routing.expert.detach().cpu(),
        weight=routing.weight.detach().float().cpu(),
    )
