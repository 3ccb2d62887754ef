"""What an MoE layer says beside its output: losses and routing travel out with the result.

Routes: what each MoE layer did with the tokens of one batch, detached from the pass that did it.

What statistics count, what a routes file holds (``checkpoint/routes_file.py``), and what can be replayed
(``moe/routing_replay.py``).

Letters: T tokens, B rows, E experts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.router import RouterOutput
from moesaic.moe.router_context import TokenContext
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """One layer's routing in one forward pass.

    ``losses`` holds the layer's weighted loss terms by name (``balance``, ``z``), scalars in the
    graph; their sum is added to the training loss exactly once. They are this rank's *share* (see
    ``moe/batch_group.py``) and exist in training only. ``context`` says which row, position and
    vocabulary id each token of ``routing`` has (padding was left out before routing). ``logits``
    are the router's, detached, for whoever watches it; ``sums`` are what its rules learn from. The
    last ``spare`` experts of ``routing`` do no work.
    """

    layer: str
    routing: Routing
    context: TokenContext
    losses: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    logits: Float[Tensor, "T E"] | None = None
    stats_vector: Float[Tensor, "S"] | None = None
    num_null_experts: int = 0

    @staticmethod
    def from_router(
        layer: str, routed: RouterOutput, *, context: TokenContext, num_null_experts: int = 0
    ) -> "RoutingRecord":
        """Make the record of what a router did."""
        losses, logits, sums = routed.losses, routed.logits, routed.stats_vector
        return RoutingRecord(layer, routed.routing, context, losses, logits, sums, num_null_experts)

    @property
    def row(self) -> Int[Tensor, "T"]:
        return self.context.row

    def router_entropy(self) -> Float[Tensor, ""] | None:
        """Mean entropy of a token's expert probabilities, as a share of ``log E``."""
        if self.logits is None or self.logits.numel() == 0:
            return None
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean() / math.log(max(2, self.logits.shape[1]))

    def logit_rms(self) -> Float[Tensor, ""] | None:
        """Root mean square of the logits' logsumexp: what a z-loss keeps small."""
        if self.logits is None or self.logits.numel() == 0:
            return None
        return self.logits.logsumexp(-1).square().mean().sqrt()


def loss_terms(
    records: Iterable[RoutingRecord], *, num_micro_batches: int
) -> dict[str, Float[Tensor, ""]]:
    """Add up the loss terms of one of ``parts`` micro-batches, by name (``loss_balance``)."""
    terms: dict[str, Float[Tensor, ""]] = {}
    for record in records:
        for name, value in record.losses.items():
            terms[f"loss_{name}"] = terms.get(f"loss_{name}", 0.0) + value / num_micro_batches
    return terms


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Which tokens were routed: vocabulary id, place in the row, row of the batch, and language.

    All int64. ``language`` is the number of the language that the token counts for.
    """

    token: Int[Tensor, "T"]
    position: Int[Tensor, "T"]
    row: Int[Tensor, "T"]
    language: Int[Tensor, "T"]

    def __len__(self) -> int:
        return self.token.numel()

    def equal(self, other: "RoutedTokens") -> bool:
        """Whether they are the same tokens at the same places."""
        pairs = ((self.token, other.token), (self.position, other.position), (self.row, other.row))
        return all(torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class LayerRoutes:
    """One layer's routing of one batch. The last ``spare`` of its experts do no work."""

    layer: str
    routing: Routing
    tokens: RoutedTokens
    num_null_experts: int = 0

    @property
    def side(self) -> str:
        """``encoder`` or ``decoder``: layers of a side route the same tokens."""
        return self.layer.partition(".")[0]


def routes_from_records(
    records: Iterable[RoutingRecord], *, language: Int[Tensor, "B"]
) -> tuple[LayerRoutes, ...]:
    """Return the routes of a pass on the host; ``language`` is that of each row of its batch."""
    sides: dict[str, RoutedTokens] = {}
    found = []
    for record in records:
        side = record.layer.partition(".")[0]
        if side not in sides:
            context, spoken = record.context, language.to(record.row.device)
            parts = (context.token, context.position, context.row, spoken[context.row])
            sides[side] = RoutedTokens(*(part.detach().cpu() for part in parts))
        found.append(
            LayerRoutes(
                record.layer, _detach_to_cpu(record.routing), sides[side], record.num_null_experts
            )
        )
    return tuple(found)


def _detach_to_cpu(routing: Routing) -> Routing:
    return replace(
        routing,
        token=routing.token.detach().cpu(),
        expert=routing.expert.detach().cpu(),
        weight=routing.weight.detach().float().cpu(),
    )
