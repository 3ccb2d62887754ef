"""Noise: what a router adds to its input or to its logits while it trains.

Letters: T tokens, D model dim, E experts.
"""

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import Context
from moesaic.moe.gate import Gate, Learner


class Noise(Choice, Learner):
    """Family of router noises. Each changes the input or the logits, in training only."""

    def on_input(
        self, x: Float[Tensor, "T D"], *, context: Context, training: bool
    ) -> Float[Tensor, "T D"]:
        """Return the router's input, float32."""
        del context, training
        return x

    def on_logits(self, gate: Gate) -> Float[Tensor, "T E"]:
        """Return the logits that everything after sees."""
        return gate.logits


class NoNoise(Noise):
    """Input and logits as they are."""


class Jitter(Noise):
    """In training, the input times U(1 - epsilon, 1 + epsilon) (2101.03961, section 2.4)."""

    epsilon: float = Field(default=0.01, gt=0, lt=1)

    def on_input(
        self, x: Float[Tensor, "T D"], *, context: Context, training: bool
    ) -> Float[Tensor, "T D"]:
        if not training:
            return x
        draw = context.uniform("jitter", width=x.shape[-1])
        return x * (1 + self.epsilon * (2 * draw - 1))
