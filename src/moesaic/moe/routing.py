"""Routing: the weighted bipartite graph between tokens and experts.

Every router, whatever its rule, says the same thing: *these tokens go to those experts with these
weights*. That sentence is kept as a list of edges, so top-k, expert choice, hash, capacity-limited
and dropless routing share one dispatcher, one set of statistics and one file format.

Letters: T tokens, E experts, K experts per token, N edges.
"""

from dataclasses import dataclass, replace

import torch

from moesaic.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """Edges ``token[n] -> expert[n]`` carrying ``weight[n]`` (int64, int64, float32).

    An edge whose expert is ``num_experts`` leads nowhere: it was dropped, and its weight is zero.
    Keeping it keeps N static, which is what compilers and collectives want. ``per_token`` is K if
    every token has K edges in token-major order (then the way home is a gather), else 0.
    """

    token: Int[Tensor, "N"]
    expert: Int[Tensor, "N"]
    weight: Float[Tensor, "N"]
    num_tokens: int
    num_experts: int
    per_token: int = 0

    @staticmethod
    def from_topk(
        weight: Float[Tensor, "T K"], *, expert: Int[Tensor, "T K"], num_experts: int
    ) -> "Routing":
        """Make the token-major edge list of a token-choice router."""
        tokens, k = expert.shape
        token = torch.arange(tokens, device=expert.device).repeat_interleave(k)
        return Routing(token, expert.flatten(), weight.flatten(), tokens, num_experts, k)

    @staticmethod
    def from_mask(weight: Float[Tensor, "T E"], *, chosen: Bool[Tensor, "T E"]) -> "Routing":
        """Make the token-major edges of the chosen pairs, as many as there are.

        What was not chosen is no edge: it takes no row, no room and no part in any statistic. The
        price is that their number has to come from the device.
        """
        token, expert = chosen.nonzero(as_tuple=True)
        return Routing(token, expert, weight[token, expert], *weight.shape)

    def drop(self, lost: Bool[Tensor, "N"]) -> "Routing":
        """Return the same edges, some of them leading nowhere."""
        return replace(
            self,
            expert=torch.where(lost, self.num_experts, self.expert),
            weight=torch.where(lost, 0.0, self.weight),
        )

    @property
    def dropped(self) -> Bool[Tensor, "N"]:
        return self.expert == self.num_experts

    def load(self) -> Int[Tensor, "E"]:
        """Edges per expert, dropped ones left out."""
        counts = torch.bincount(self.expert, minlength=self.num_experts + 1)
        return counts[: self.num_experts]
