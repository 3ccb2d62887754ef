"""Among: which of the experts a token may choose from.

Letters: T tokens, E experts, G groups.
"""

from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor


class ExpertGroups(Choice):
    """Family: what narrows a token's choice before it is made."""

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the scores to choose by, minus infinity where there is no choice."""
        raise NotImplementedError

    def problems(self, *, experts: int, k: int) -> str | None:
        """Return what it expects instead of so many experts, of which k are chosen, or None."""
        del experts, k
        return None


class AllExperts(ExpertGroups):
    """Any expert."""

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        return scores


class TopGroups(ExpertGroups):
    """Experts of the ``kept`` best of ``groups`` equal groups of neighbours.

    A group's score is the sum of its ``best`` highest: 2 in DeepSeek-V3 (2412.19437, section 2.1.2,
    where a group is a node), 1 in DeepSeek-V2 (2405.04434, section 2.2.2, where it is a device).
    So a token's rows travel to few places.
    """

    num_groups: int = Field(ge=1)
    top_groups: int = Field(ge=1)
    experts_per_score: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "TopGroups":
        if self.top_groups > self.num_groups:
            raise ValueError(f"kept of at most groups={self.num_groups}, not {self.top_groups}")
        return self

    def __call__(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        each = scores.unflatten(-1, (self.num_groups, -1))
        good = each.topk(min(self.experts_per_score, each.shape[-1]), dim=-1).values.sum(-1)
        lost = good.new_ones(good.shape).scatter(-1, good.topk(self.top_groups, dim=-1).indices, 0)
        return each.masked_fill(lost.bool()[..., None], float("-inf")).flatten(-2)

    def problems(self, *, experts: int, k: int) -> str | None:
        if experts % self.num_groups:
            return f"a number of experts that groups={self.num_groups} divides, not {experts}"
        room = experts // self.num_groups * self.top_groups
        return None if k <= room else f"k of at most {room}, all in the groups kept, not {k}"
