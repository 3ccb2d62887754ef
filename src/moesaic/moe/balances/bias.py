"""BiasUpdate: balance without a loss.

Letters: E experts.
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.balance import Balance, BalanceInputs
from moesaic.moe.gate import RoutingStats, RuleState


class BiasUpdate(Balance):
    """Auxiliary-loss-free balancing (2408.15664, algorithm 1): loss zero, gradient none.

    Each expert has a bias that is added to its score when experts are chosen, in training and
    after, and never to a weight. After an optimizer step it goes up by ``rate`` where the expert
    had less than the mean load of the step (all micro-batches and ranks), down where it had more.
    The select says what a score is; the paper's are sigmoids, ``TopK`` adds to logits.
    """

    rate: float = Field(default=0.001, gt=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return inputs.zero()

    def selection_bias(self, state: RuleState) -> Float[Tensor, "E"] | None:
        return state["bias"]

    def initial_state(self, num_experts: int) -> dict[str, Tensor]:
        return {"bias": torch.zeros(num_experts)}

    def update_state(self, state: RuleState, *, stats: RoutingStats) -> RuleState:
        wanting = stats.load.mean() - stats.load
        return {"bias": state["bias"] + self.rate * wanting.sign().float()}
