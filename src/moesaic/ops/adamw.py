"""AdamW's update of many tensors, and its definition as separate float32 operations.

Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101). Each operation is
rounded to float32 by itself and no value depends on its place in a tensor, so a tensor updated in
parts, on other ranks or in another memory, gets the same bits. torch's kernels fuse some products
and sums, and others at the end of a tensor than before it.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moesaic.core.shapes import Float, Tensor


class AdamWFactors(NamedTuple):
    """The numbers of one update, rounded to float32.

    ``decay`` is ``1 - lr * weight_decay``, ``first`` is ``1 - beta1``, ``second`` is ``1 - beta2``,
    ``correction`` is ``sqrt(1 - beta2 ** step)``, ``step_size`` is ``lr / (1 - beta1 ** step)``;
    ``grad_scale`` multiplies the gradient first.
    """

    grad_scale: float
    decay: float
    first: float
    beta2: float
    second: float
    correction: float
    eps: float
    step_size: float


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """Learning rate, decay rates of the two means, epsilon and weight decay of an update."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def factors(self, step: float, *, grad_scale: float = 1.0) -> AdamWFactors:
        """Return the factors of a tensor's ``step``-th update (from 1)."""
        beta1, beta2 = self.betas
        correction = math.sqrt(1 - beta2**step)
        decay, step_size = 1 - self.lr * self.weight_decay, self.lr / (1 - beta1**step)
        given = (grad_scale, decay, 1 - beta1, beta2, 1 - beta2, correction, self.eps, step_size)
        return AdamWFactors(*struct.unpack("8f", struct.pack("8f", *given)))


class AdamWTensor(NamedTuple):
    """A tensor, or a part of one, with its gradient, its state and the factors of its update.

    All are float32; ``grad`` may be of a narrower type. ``rounded``, if given, receives the updated
    ``param``, rounded to its type.
    """

    param: Float[Tensor, "*n"]
    grad: Float[Tensor, "*n"]
    exp_avg: Float[Tensor, "*n"]
    exp_avg_sq: Float[Tensor, "*n"]
    factors: AdamWFactors
    rounded: Tensor | None = None


AdamWKernel = Callable[[Sequence[AdamWTensor]], None]


def adamw_by_operations(tensors: Sequence[AdamWTensor]) -> None:
    """Update tensors in place by separate torch operations: the reference of compiled kernels."""
    for t in tensors:
        by, grad = t.factors, t.grad.float()
        grad = grad * by.grad_scale
        t.param.mul_(by.decay)
        t.exp_avg.add_((grad - t.exp_avg).mul_(by.first))
        t.exp_avg_sq.mul_(by.beta2).add_((grad * by.second).mul_(grad))
        # torch's float32 root is off by a bit on some CPUs; that of float64, rounded, is exact
        root = t.exp_avg_sq.double().sqrt_().float()
        denominator = root.div_(by.correction).add_(by.eps)
        t.param.sub_((t.exp_avg * by.step_size).div_(denominator))
        if t.rounded is not None:
            t.rounded.copy_(t.param)
