"""NullBalance: true experts evenly used, null experts as one.

Letters: E experts (null ones included).
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, Scores
from moesaic.moe.gate import Seen, State


class NullBalance(Balance):
    """``alpha * E * sum_e f_e p_e``, f of a null expert being their mean (AdaMoE, 2406.13233).

    So nothing pushes null experts to be used alike, only their total counts. f_e is the fraction
    of all edges that chose expert e, p_e its mean probability in a softmax over all E. alpha goes
    from ``weight`` to ``final`` in equal parts over ``steps`` optimizer steps (the two ends are the
    paper's, the line between them is ours).
    """

    weight: float = Field(default=0.02, ge=0)
    final: float = Field(default=0.0001, ge=0)
    steps: int = Field(default=1000, ge=1)

    def __call__(self, scores: Scores) -> Float[Tensor, ""]:
        load = scores.load
        fraction = load / load.sum().clamp(min=1)
        true = load.numel() - scores.gate.spare
        if scores.gate.spare:
            nulls = fraction[true:].mean().expand(scores.gate.spare)
            fraction = torch.cat([fraction[:true], nulls])
        mean = scores.probabilities.sum(0) / scores.tokens.clamp(min=1).float()
        done = (scores.gate.state["step"] / self.steps).clamp(max=1)
        alpha = self.weight + (self.final - self.weight) * done
        return alpha * load.numel() * torch.dot(fraction.float(), mean)

    def evening(self) -> float:
        return self.weight

    def start(self, num_experts: int) -> dict[str, Tensor]:
        del num_experts
        return {"step": torch.zeros(())}

    def learn(self, state: State, *, seen: Seen) -> State:
        del seen
        return {"step": state["step"] + 1}
