"""The work that all contenders are given: one set of tensors, and what a contender is.

Letters: T tokens, D model dim, F hidden width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from moesaic.bench.shapes import Shape, zipf_bias
from moesaic.core.shapes import Float, Tensor

Passes = Literal["forward", "forward+backward"]
Skew = Literal["none", "zipf"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Inputs, weights, and ``pull``, the gradient that comes back to the output."""

    shape: Shape
    passes: Passes
    x: Float[Tensor, "T D"]
    gate: Float[Tensor, "E D"]
    up: Float[Tensor, "E D 2*F"]
    down: Float[Tensor, "E F D"]
    pull: Float[Tensor, "T D"]

    @property
    def trains(self) -> bool:
        return self.passes == "forward+backward"

    def leaf(self, tensor: Tensor) -> Tensor:
        """A contender's own copy, with a gradient if this problem has a way back."""
        return tensor.detach().clone().requires_grad_(self.trains)

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = (self.x, self.gate, self.up, self.down, self.pull)
        return Problem(self.shape, self.passes, *(t.to(dtype) for t in tensors))


def make_problem(shape: Shape, *, passes: Passes, skew: Skew = "none", seed: int = 0) -> Problem:
    """Draw the tensors of a problem, float32. The first feature of x is one: it carries a skew."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int, fan: int = 1) -> Tensor:
        return torch.randn(size, generator=draw) * fan**-0.5

    x = normal(shape.tokens, shape.dim)
    gate = normal(shape.experts, shape.dim, fan=shape.dim)
    up = normal(shape.experts, shape.dim, 2 * shape.hidden, fan=shape.dim)
    down = normal(shape.experts, shape.hidden, shape.dim, fan=shape.hidden)
    x[:, 0], gate[:, 0] = 1.0, 0.0
    if skew == "zipf":
        gate[:, 0] = zipf_bias(x @ gate.t(), k=shape.k)
    return Problem(shape, passes, x, gate, up, down, normal(shape.tokens, shape.dim))


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that computes a layer. ``weights`` are its parameters, ``x`` its input."""

    name: str
    forward: Callable[[], Tensor]
    x: Tensor
    weights: tuple[Tensor, ...]
    pull: Tensor

    def run(self) -> Tensor:
        """Forward, and backward to x and every weight if they ask for it."""
        leaves = [t for t in (self.x, *self.weights) if t.requires_grad]
        with torch.set_grad_enabled(bool(leaves)):
            out = self.forward()
        if leaves:
            pull = self.pull.to(out.dtype).view(out.shape)
            torch.autograd.grad(out, leaves, pull, allow_unused=True)
        return out.detach()


@dataclass(frozen=True, slots=True)
class Absent:
    """A contender that cannot take part, and what to do about it."""

    name: str
    reason: str
