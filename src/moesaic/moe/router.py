"""Router: gate -> select -> limit, with balance beside it; float32 throughout, since it decides.

Letters: T tokens, D model dim, E experts.
"""

from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Scores
from moesaic.moe.config import MoE
from moesaic.moe.reduce import Reduce
from moesaic.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class Routed:
    """The edges, this rank's share of each weighted balance term, and the logits, detached."""

    routing: Routing
    losses: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "T E"]


class Router(nn.Module):
    """A bias-free linear gate and the rules of its config."""

    def __init__(self, config: MoE, *, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, dim))
        self.config = config

    def forward(self, x: Float[Tensor, "T D"], *, reduce: Reduce) -> Routed:
        rules = self.config
        with torch.autocast(x.device.type, enabled=False):
            noisy = rules.noise(x.float(), training=self.training)
            logits = noisy @ self.weight.float().t()
            chosen = rules.select(logits, training=self.training)
            routing = rules.select.finish(rules.limit(chosen, training=self.training))
            losses = self._losses(logits, chosen=chosen, reduce=reduce)
            return Routed(routing, losses, logits.detach())

    def _losses(
        self, logits: Float[Tensor, "T E"], *, chosen: Routing, reduce: Reduce
    ) -> dict[str, Float[Tensor, ""]]:
        if not self.training or not self.config.balance:
            return {}
        own = torch.tensor([logits.shape[0]], device=logits.device)
        counts = reduce(torch.cat([chosen.load(), own]))
        scores = Scores(logits, chosen, load=counts[:-1], tokens=counts[-1])
        losses: dict[str, Float[Tensor, ""]] = {}
        for term in self.config.balance:
            losses[term.name] = losses.get(term.name, logits.new_zeros(())) + term(scores)
        return losses
