"""BiasUpdate: balance without a loss.

Letters: E experts.
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, Scores
from moesaic.moe.gate import Seen, State


class BiasUpdate(Balance):
    """Auxiliary-loss-free balancing (2408.15664, algorithm 1): loss zero, gradient none.

    Each expert has a bias that is added to its score when experts are chosen, in training and
    after, and never to a weight. After an optimizer step it goes up by ``rate`` where the expert
    had less than the mean load of the step (all micro-batches and ranks), down where it had more.
    The select says what a score is; the paper's are sigmoids, ``TopK`` adds to logits.
    """

    rate: float = Field(default=0.001, gt=0)

    def __call__(self, scores: Scores) -> Float[Tensor, ""]:
        return scores.zero()

    def bias(self, state: State) -> Float[Tensor, "E"] | None:
        return state["bias"]

    def start(self, num_experts: int) -> dict[str, Tensor]:
        return {"bias": torch.zeros(num_experts)}

    def learn(self, state: State, *, seen: Seen) -> State:
        wanting = seen.load.mean() - seen.load
        return {"bias": state["bias"] + self.rate * wanting.sign().float()}
