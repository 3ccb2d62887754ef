"""Layer workload: named shapes of an MoE layer, its random tensors, and what an implementation is.

Letters: T tokens, D model dim, F hidden width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from moesaic.core.errors import UserError, did_you_mean
from moesaic.core.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Tokens, model dim, hidden width of an expert, experts, and experts per token."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int

    @property
    def rows(self) -> int:
        """Rows through experts: those of a dense layer of equal work."""
        return self.tokens * self.k

    @property
    def flops(self) -> int:
        """FLOPs of the experts' three matrices, forward."""
        return 6 * self.rows * self.dim * self.hidden

    @property
    def min_saved_values(self) -> int:
        """Values that backward needs at least: x and the gated pre-activation."""
        return self.tokens * self.dim + 2 * self.rows * self.hidden

    def __str__(self) -> str:
        return ",".join(str(n) for n in (self.tokens, self.dim, self.hidden, self.experts, self.k))


LAYER_SHAPES = {
    "A": LayerShape(2048, 512, 1408, 8, 2),  # few large experts, as in Mixtral
    "B": LayerShape(4096, 512, 512, 64, 6),  # many small ones, as in DeepSeekMoE
    "C": LayerShape(64, 512, 512, 64, 6),  # the same while decoding: a few rows per expert
    "D": LayerShape(8192, 768, 2048, 16, 1),  # one expert per token, as in Switch
}


def parse_shape(text: str) -> LayerShape:
    """Return ``LAYER_SHAPES[text]``, or the shape of ``tokens,dim,hidden,experts,k``."""
    if text.upper() in LAYER_SHAPES:
        return LAYER_SHAPES[text.upper()]
    numbers = text.split(",")
    if len(numbers) != 5 or not all(n.strip().isdecimal() and int(n) for n in numbers):
        known = f"{', '.join(LAYER_SHAPES)}{did_you_mean(text, LAYER_SHAPES)}"
        raise UserError(
            f'"{text}" is no shape: expected one of {known}, or five numbers '
            "tokens,dim,hidden,experts,k such as 2048,512,1408,8,2"
        )
    shape = LayerShape(*(int(n) for n in numbers))
    if shape.k > shape.experts:
        raise UserError(
            f"shape {text}: k={shape.k} of {shape.experts} experts; k may be at most that"
        )
    return shape


def zipf_bias(logits: Float[Tensor, "T E"], *, k: int, rounds: int = 60) -> Float[Tensor, "E"]:
    """Return a router bias so that expert e is selected in proportion to 1 / (e + 1).

    A token selects an expert at most once, so no expert gets more than all tokens.
    """
    tokens, experts = logits.shape
    share = 1 / torch.arange(1, experts + 1, dtype=torch.float32)
    target = share / share.sum() * k
    while (target > 1).any():  # the excess is distributed over the others
        full = target >= 1
        target = torch.where(full, 1.0, share * (k - full.sum()) / share[~full].sum())
    bias = torch.zeros(experts)
    for turn in range(rounds):
        chosen = (logits + bias).topk(k, dim=-1).indices.flatten()
        load = torch.bincount(chosen, minlength=experts) / tokens
        bias += 2 / (1 + turn / 10) * (target - load) / (target + load).clamp(min=1e-3)
    return bias - bias.mean()


Passes = Literal["forward", "forward+backward"]


Skew = Literal["none", "zipf"]


@dataclass(frozen=True, slots=True)
class LayerWorkload:
    """Input, weights, and the gradient of the output."""

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
        """Return a copy, which requires a gradient if backward is measured."""
        return tensor.detach().clone().requires_grad_(self.runs_backward)

    def to(self, dtype: torch.dtype) -> "LayerWorkload":
        tensors = (self.x, self.router_weight, self.up, self.down, self.grad_out)
        return LayerWorkload(self.shape, self.passes, *(t.to(dtype) for t in tensors))


def make_workload(
    shape: LayerShape, *, passes: Passes, skew: Skew = "none", seed: int = 0
) -> LayerWorkload:
    """Draw float32 tensors. The first feature of x is one, so its router weight is a bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, fan: int = 1) -> Tensor:
        return torch.randn(size, generator=generator) * fan**-0.5

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
    """An implementation of the layer; ``weights`` are its parameters, ``x`` its input."""

    name: str
    forward: Callable[[], Tensor]
    x: Tensor
    weights: tuple[Tensor, ...]
    grad_out: Tensor

    def run(self) -> Tensor:
        """Run forward, and backward to x and every weight that requires a gradient."""
        leaves = [t for t in (self.x, *self.weights) if t.requires_grad]
        with torch.set_grad_enabled(bool(leaves)):
            out = self.forward()
        if leaves:
            grad_out = self.grad_out.to(out.dtype).view(out.shape)
            torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
        return out.detach()


@dataclass(frozen=True, slots=True)
class UnavailableImplementation:
    """An implementation that cannot run here, and the reason."""

    name: str
    reason: str


def saved_bytes(implementation: Implementation) -> int:
    """Return the bytes that forward saves for backward, with x, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in implementation.weights}
    storages: dict[int, torch.UntypedStorage] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # referenced, so no address is reused
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        torch.enable_grad(),
    ):
        implementation.forward()
    return sum(s.nbytes() for address, s in storages.items() if address not in weights)
