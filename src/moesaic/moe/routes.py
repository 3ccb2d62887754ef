"""Routes: what each MoE layer did with the tokens of one batch, detached from the pass that did it.

What statistics count, what a routes file holds (``checkpoint/routes.py``), and what can be replayed
(``moe/replay.py``).

Letters: T tokens, B rows, E experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from moesaic.core.shapes import Int, Tensor
from moesaic.moe.record import RoutingRecord
from moesaic.moe.routing import Routing


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


def routes_from_records(records: Iterable[RoutingRecord], *, language: Int[Tensor, "B"]) -> tuple[LayerRoutes, ...]:
    """Return the routes of a pass on the host; ``language`` is that of each row of its batch."""
    sides: dict[str, RoutedTokens] = {}
    found = []
    for record in records:
        side = record.layer.partition(".")[0]
        if side not in sides:
            context, spoken = record.context, language.to(record.row.device)
            parts = (context.token, context.position, context.row, spoken[context.row])
            sides[side] = RoutedTokens(*(part.detach().cpu() for part in parts))
        found.append(LayerRoutes(record.layer, _detach_to_cpu(record.routing), sides[side], record.num_null_experts))
    return tuple(found)


def _detach_to_cpu(routing: Routing) -> Routing:
    return replace(
        routing,
        token=routing.token.detach().cpu(),
        expert=routing.expert.detach().cpu(),
        weight=routing.weight.detach().float().cpu(),
    )
