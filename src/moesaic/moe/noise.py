"""Noise: what a router adds to its input or to its logits while it trains.

Letters: T tokens, D model dim, E experts.
"""

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import TokenContext
from moesaic.moe.gate import RouterContext, StatefulRule


class RouterNoise(Choice, StatefulRule):
    """Family of router noises. Each changes the input or the logits, in training only."""

    def apply_to_input(
        self, x: Float[Tensor, "T D"], *, context: TokenContext, training: bool
    ) -> Float[Tensor, "T D"]:
        """Return the router's input, float32."""
        del context, training
        return x

    def apply_to_logits(self, router: RouterContext) -> Float[Tensor, "T E"]:
        """Return the logits that everything after sees."""
        return router.logits


class NoRouterNoise(RouterNoise):
    """Input and logits as they are."""


class Jitter(RouterNoise):
    """In training, the input times U(1 - epsilon, 1 + epsilon) (2101.03961, section 2.4)."""

    epsilon: float = Field(default=0.01, gt=0, lt=1)

    def apply_to_input(
        self, x: Float[Tensor, "T D"], *, context: TokenContext, training: bool
    ) -> Float[Tensor, "T D"]:
        if not training:
            return x
        draw = context.uniform("jitter", width=x.shape[-1])
        return x * (1 + self.epsilon * (2 * draw - 1))
