"""ExpertChoice: experts choose their tokens, so they are balanced by construction.

Letters: T tokens, E experts.
"""

from typing import ClassVar

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.gate import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select


class ExpertChoice(Select):
    """Each expert takes its ``factor * n / E`` best of a row's n tokens (2202.09368, section 3.2).

    Scores are a softmax over experts and weights the plain scores of the pairs that were made. A
    token may have no expert, or all. The paper chooses over a batch; here over each row of it (one
    text, rounded up, at least one token), so an answer depends neither on what else is in the batch
    nor on how many ranks share it.

    Not causal: whether a token is taken depends on those after it. A decoder refuses it.
    """

    causal: ClassVar[bool] = False
    needs_whole_rows: ClassVar[bool] = True

    capacity_factor: float = Field(default=2.0, gt=0)

    def __call__(self, router: RouterContext) -> Routing:
        scores, row = router.logits.softmax(-1), router.context.row
        place = _rank_within_row(router.biased_scores(scores), row=row)
        length = torch.bincount(row)[row].float()
        room = (length * (self.capacity_factor / scores.shape[-1])).ceil().long()
        return Routing.from_mask(scores, chosen=place < room[:, None])

    def experts_per_token(self, num_experts: int) -> float:
        return min(self.capacity_factor, float(num_experts))

    def problems(self, *, experts: int, num_null_experts: int) -> str | None:
        del experts, num_null_experts
        return None


def _rank_within_row(scores: Float[Tensor, "T E"], *, row: Int[Tensor, "T"]) -> Int[Tensor, "T E"]:
    """Return each token's place among its row, for each expert: 0 for the highest score."""
    best = scores.argsort(dim=0, descending=True, stable=True)
    order = best.gather(0, row[best].argsort(dim=0, stable=True))
    queue = row[order[:, 0]]  # rows one after the other, the same for every expert
    place = torch.arange(len(queue), device=row.device) - torch.searchsorted(queue, queue)
    return torch.empty_like(order).scatter(0, order, place[:, None].expand_as(order))
