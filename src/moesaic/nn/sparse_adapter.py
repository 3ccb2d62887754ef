"""Sparse adapters: a few values of a frozen matrix are trained, as differences from it.

The indices of the values are a buffer, so they are saved with the differences. Of experts each has
as many values of its own.

Letters: E experts, K values, M and N the dims of a matrix, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.adapter import LinearAdapter
from moesaic.nn.initializer import CustomInitializers, Initializer, normal_parameter
from moesaic.ops.counter_rng import hash_combine, hash_name

# receives the gradient of a whole matrix, in each backward pass
Observer = Callable[[Float[Tensor, "*E M N"]], None]


def scatter_values(
    values: Float[Tensor, "*E K"], *, index: Int[Tensor, "*E K"], like: Float[Tensor, "*E M N"]
) -> Float[Tensor, "*E M N"]:
    """Return a matrix of zeros with ``values`` at ``index``, row by row, in the dtype of values."""
    flat = values.new_zeros(*values.shape[:-1], like.shape[-2] * like.shape[-1])
    return flat.scatter_(-1, index.long(), values).view(like.shape)


def random_indices(shape: tuple[int, ...], *, count: int, name: str) -> Int[Tensor, "*E K"]:
    """Return distinct indices into each matrix of a ``shape``, a function of the name alone."""
    number, size = shape[:-2], shape[-2] * shape[-1]
    rows = [
        hash_combine(torch.arange(size) + row * size, hash_name(name)).topk(count).indices
        for row in range(number[0] if number else 1)
    ]
    return torch.stack(rows).view(*number, count).int()


class _ScatterValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, index: Tensor, like: Tensor, observer: Observer | None
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.observer = observer
        return scatter_values(values, index=index, like=like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        if ctx.observer is not None:
            ctx.observer(grads[0])
        return grads[0].flatten(-2).gather(-1, index.long()), None, None, None


class SparseValues(CustomInitializers):
    """Base of sparse adapters: ``NAME_delta`` [*E, K] and ``NAME_index`` for each matrix NAME.

    ``observers`` see the gradients of whole matrices, which exist for a moment in backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observers: dict[str, Observer] = {}
        self.kinds: dict[str, str] = {}

    def add_values(self, name: str, weight: Tensor, *, density: float, path: str) -> None:
        """Train a share of the values of ``weight``, at random places; differences are zero."""
        shape = tuple(weight.shape)
        count = max(1, round(density * shape[-2] * shape[-1]))
        with torch.device(weight.device):
            delta = normal_parameter(*shape[:-2], count, std=0.0)
        self.register_parameter(f"{name}_delta", delta)
        index = random_indices(shape, count=count, name=f"{path}.{name}")
        self.register_buffer(f"{name}_index", index)
        self.kinds[name] = "expert" if len(shape) == 3 else "matrix"

    def initializers(self) -> Mapping[str, Initializer]:
        return {f"{name}_delta": Initializer(kind, std=0.0) for name, kind in self.kinds.items()}

    def difference(
        self, name: str, weight: Float[Tensor, "*E M N"], *, first: int = 0
    ) -> Float[Tensor, "*E M N"]:
        """Return the trained differences of a matrix, zeros elsewhere.

        Of experts ``weight`` and the values may be some, from number ``first`` on.
        """
        values, index = self.get_parameter(f"{name}_delta"), self.get_buffer(f"{name}_index")
        if index.dim() == 2:
            index = index[first : first + len(values)]
        return _ScatterValues.apply(values, index, weight, self.observers.get(name))


class SparseLinear(SparseValues, LinearAdapter):
    """The sparse adapter of an ``nn.Linear``."""

    def __init__(self, linear: nn.Linear, *, density: float, path: str) -> None:
        super().__init__()
        self.add_values("weight", linear.weight, density=density, path=path)
        self.shape = linear.weight.shape

    def forward(self, x: Float[Tensor, "*T M"]) -> Float[Tensor, "*T N"]:
        return F.linear(x, self.difference("weight", x.new_empty(self.shape, device="meta")))
