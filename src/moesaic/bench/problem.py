"""The work that all contenders are given: one set of tensors, and what a contender is.

Letters: T tokens, D model dim, F hidden width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from moesaic.bench.shapes import LayerShape, zipf_bias
from moesaic.core.shapes import Float, Tensor

Passes = Literal["forward", "forward+backward"]
Skew = Literal["none", "zipf"]


@dataclass(frozen=True, slots=True)
class LayerWorkload:
    """Inputs, weights, and ``pull``, the gradient that comes back to the output."""

    shape: LayerShape
    passes: Passes
    x: Float[Tensor, "T D"]
    router_weight: Float[Tensor, "E D"]
    up: Float[Tensor, "E D 2*F"]
    down: Float[Tensor, "E F D"]
    grad_out: Float[Tensor, "T D"]

    @property
    def runs_backward(self) -> bool:
        return self.passes == "forward+backward"

    def leaf_copy(self, tensor: Tensor) -> Tensor:
        """A contender's own copy, with a gradient if this problem has a way back."""
        return tensor.detach().clone().requires_grad_(self.runs_backward)

    def to(self, dtype: torch.dtype) -> "LayerWorkload":
        tensors = (self.x, self.router_weight, self.up, self.down, self.grad_out)
        return LayerWorkload(self.shape, self.passes, *(t.to(dtype) for t in tensors))


def make_workload(shape: LayerShape, *, passes: Passes, skew: Skew = "none", seed: int = 0) -> LayerWorkload:
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
    return LayerWorkload(shape, passes, x, gate, up, down, normal(shape.tokens, shape.dim))


@dataclass(frozen=True, slots=True)
class Implementation:
    """Something that computes a layer. ``weights`` are its parameters, ``x`` its input."""

    name: str
    forward: Callable[[], Tensor]
    x: Tensor
    weights: tuple[Tensor, ...]
    grad_out: Tensor

    def run(self) -> Tensor:
        """Forward, and backward to x and every weight if they ask for it."""
        leaves = [t for t in (self.x, *self.weights) if t.requires_grad]
        with torch.set_grad_enabled(bool(leaves)):
            out = self.forward()
        if leaves:
            pull = self.grad_out.to(out.dtype).view(out.shape)
            torch.autograd.grad(out, leaves, pull, allow_unused=True)
        return out.detach()


@dataclass(frozen=True, slots=True)
class UnavailableImplementation:
    """A contender that cannot take part, and what to do about it."""

    name: str
    reason: str
