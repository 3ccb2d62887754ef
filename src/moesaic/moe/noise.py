"""Noise: what a router adds to its input while it trains.

Letters: T tokens, D model dim.
"""

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor


class Noise(Choice):
    """Family of router noises."""

    def __call__(self, x: Float[Tensor, "T D"], *, training: bool) -> Float[Tensor, "T D"]:
        """Return the router's input."""
        raise NotImplementedError


class NoNoise(Noise):
    """The input as it is."""

    def __call__(self, x: Float[Tensor, "T D"], *, training: bool) -> Float[Tensor, "T D"]:
        del training
        return x


class Jitter(Noise):
    """In training, the input times U(1 - epsilon, 1 + epsilon) (2101.03961, section 2.4)."""

    epsilon: float = Field(default=0.01, gt=0, lt=1)

    def __call__(self, x: Float[Tensor, "T D"], *, training: bool) -> Float[Tensor, "T D"]:
        if not training:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.epsilon, 1 + self.epsilon)
