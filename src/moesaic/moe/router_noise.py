"""Router noise: random changes of the router's input or logits in training.

Letters: T tokens, D model dim, E experts.
"""

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.router_context import (
    RouterContext,
    RoutingStats,
    RuleState,
    StatefulRule,
    TokenContext,
)


class RouterNoise(Choice, StatefulRule):
    """Family of router noises: each changes the input or the logits. Called in training only."""

    def apply_to_input(
        self, x: Float[Tensor, "T D"], _context: TokenContext, /
    ) -> Float[Tensor, "T D"]:
        """Return the router's input, float32."""
        return x

    def apply_to_logits(self, router: RouterContext) -> Float[Tensor, "T E"]:
        """Return the logits for selection and balance."""
        return router.logits


class NoRouterNoise(RouterNoise):
    """No change of input or logits."""


class Jitter(RouterNoise):
    """The input times U(1 - epsilon, 1 + epsilon) (2101.03961, section 2.4)."""

    epsilon: float = Field(default=0.01, gt=0, lt=1)

    def apply_to_input(
        self, x: Float[Tensor, "T D"], context: TokenContext, /
    ) -> Float[Tensor, "T D"]:
        draw = context.uniform("jitter", width=x.shape[-1])
        return x * (1 + self.epsilon * (2 * draw - 1))


class StochasticWarmup(RouterNoise):
    """``alpha s + (1 - alpha) (mu + sigma eps)`` in place of logits s (Ling, 2503.05139).

    ``alpha = min(i / warmup_steps, 1)`` at step i and eps is standard normal, so all experts have
    similar loads at first. mu and sigma are each expert's running mean and standard deviation of
    s: of the first step at first, later moved by ``rate`` a step (rate and per-expert statistics
    are ours). After ``warmup_steps``, logits are exactly s.
    """

    warmup_steps: int = Field(default=200, ge=1)
    rate: float = Field(default=0.1, gt=0, le=1)

    def apply_to_logits(self, router: RouterContext) -> Float[Tensor, "T E"]:
        state, experts = router.state, router.logits.shape[-1]
        alpha = (state["step"] / self.warmup_steps).clamp(max=1)
        draw = router.context.normal("routing warm-up", width=experts)
        random = state["mean"] + state["std"] * draw
        return alpha * router.logits + (1 - alpha) * random

    def initial_state(self, num_experts: int, /) -> dict[str, Tensor]:
        return {
            "step": torch.zeros(()),
            "mean": torch.zeros(num_experts),
            "std": torch.ones(num_experts),
        }

    def update_state(self, state: RuleState, stats: RoutingStats, /) -> RuleState:
        tokens = stats.num_tokens.clamp(min=1)
        mean = stats.logit_sum / tokens
        std = (stats.logit_square_sum / tokens - mean.square()).clamp(min=0).sqrt()
        # the first step replaces the initial values
        rate = torch.where(state["step"] == 0, 1.0, self.rate)
        return {
            "step": state["step"] + 1,
            "mean": torch.lerp(state["mean"], mean.float(), rate),
            "std": torch.lerp(state["std"], std.float(), rate),
        }
