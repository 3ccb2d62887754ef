"""Routing: the weighted bipartite graph between tokens and experts.

Every routing rule returns a list of edges (token, expert, weight), so top-k, expert choice, hash,
capacity-limited and dropless routing share one dispatcher, one set of statistics and one file
format.

Letters: T tokens, E experts, K experts per token, N edges.
"""

from dataclasses import dataclass, replace

import torch

from moesaic.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """Edges ``token[n] -> expert[n]`` with ``weight[n]`` (int64, int64, float32).

    An edge whose expert is ``num_experts`` is dropped, and its weight is zero. Keeping it keeps N
    static, which compilers and collectives need. ``per_token`` is K if every token has K edges in
    token-major order (then unpermuting is a gather), else 0.
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
        """Return the token-major edges of a token-choice router."""
        tokens, k = expert.shape
        token = torch.arange(tokens, device=expert.device).repeat_interleave(k)
        return Routing(token, expert.flatten(), weight.flatten(), tokens, num_experts, k)

    @staticmethod
    def from_mask(weight: Float[Tensor, "T E"], *, chosen: Bool[Tensor, "T E"]) -> "Routing":
        """Return the token-major edges of the selected pairs.

        A pair that is not selected has no edge, so it uses no row and no capacity and is in no
        statistic. The host waits for the device to read the number of edges.
        """
        token, expert = chosen.nonzero(as_tuple=True)
        return Routing(token, expert, weight[token, expert], *weight.shape)

    def drop(self, lost: Bool[Tensor, "N"]) -> "Routing":
        """Return the same edges, those in the mask dropped."""
        return replace(
            self,
            expert=torch.where(lost, self.num_experts, self.expert),
            weight=torch.where(lost, 0.0, self.weight),
        )

    @property
    def dropped(self) -> Bool[Tensor, "N"]:
        return self.expert == self.num_experts

    def load(self) -> Int[Tensor, "E"]:
        """Return the number of edges per expert, dropped ones left out."""
        # not bincount, which waits for a GPU and has no static shape
        counts = self.expert.new_zeros(self.num_experts + 1)
        counts.index_add_(0, self.expert, torch.ones_like(self.expert))
        return counts[: self.num_experts]
