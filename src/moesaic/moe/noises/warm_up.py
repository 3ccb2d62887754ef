"""StochasticWarmUp: routing that starts at random and ends at the router's own decision.

Letters: T tokens, E experts.
"""

import torch
from pydantic import Field

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.gate import Gate, Seen, State
from moesaic.moe.noise import Noise


class StochasticWarmUp(Noise):
    """``alpha s + (1 - alpha) (mu + sigma eps)`` in place of logits s (Ling, 2503.05139).

    ``alpha = min(i / steps, 1)`` at step i and eps is standard normal, so that experts start alike
    loaded and no early favourite takes everything. mu and sigma are each expert's running mean and
    standard deviation of s: of the first step at first, later moved by ``rate`` a step (rate and
    per-expert statistics are ours). After ``steps``, and outside training, logits are exactly s.
    """

    steps: int = Field(default=200, ge=1)
    rate: float = Field(default=0.1, gt=0, le=1)

    def on_logits(self, gate: Gate) -> Float[Tensor, "T E"]:
        if not gate.training:
            return gate.logits
        state, experts = gate.state, gate.logits.shape[-1]
        alpha = (state["step"] / self.steps).clamp(max=1)
        draw = gate.context.normal("routing warm-up", width=experts)
        random = state["mean"] + state["std"] * draw
        return alpha * gate.logits + (1 - alpha) * random

    def start(self, num_experts: int) -> dict[str, Tensor]:
        return {
            "step": torch.zeros(()),
            "mean": torch.zeros(num_experts),
            "std": torch.ones(num_experts),
        }

    def learn(self, state: State, *, seen: Seen) -> State:
        tokens = seen.tokens.clamp(min=1)
        mean = seen.logits / tokens
        std = (seen.squares / tokens - mean.square()).clamp(min=0).sqrt()
        # the first step replaces what the state started with
        rate = torch.where(state["step"] == 0, 1.0, self.rate)
        return {
            "step": state["step"] + 1,
            "mean": torch.lerp(state["mean"], mean.float(), rate),
            "std": torch.lerp(state["std"], std.float(), rate),
        }
