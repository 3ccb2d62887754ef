"""Expert bias: load balancing without an auxiliary loss, by a bias per expert (DeepSeek-V3).

Letters: E experts (null experts included).
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.auxiliary_losses import Balance, BalanceInputs
from moesaic.moe.router_context import RoutingStats, RuleState


class BiasUpdate(Balance):
    """Auxiliary-loss-free balancing by a bias per expert (2408.15664, algorithm 1). Its loss is 0.

    The bias is added to the expert's score when experts are selected, in training and inference,
    never to a weight. An optimizer step increases it by ``rate`` if the expert's load was below the
    mean of the step (all micro-batches and ranks), and decreases it if above. The selection rule
    defines the score: the paper's are sigmoids, ``TopK`` adds to logits or probabilities.
    """

    rate: float = Field(default=0.001, gt=0)

    def __call__(self, inputs: BalanceInputs) -> Float[Tensor, ""]:
        return inputs.zero()

    def selection_bias(self, state: RuleState, /) -> Float[Tensor, "E"] | None:
        return state["bias"]

    def initial_state(self, num_experts: int, /) -> dict[str, Tensor]:
        return {"bias": torch.zeros(num_experts)}

    def update_state(self, state: RuleState, stats: RoutingStats, /) -> RuleState:
        missing = stats.load.mean() - stats.load
        return {"bias": state["bias"] + self.rate * missing.sign().float()}
