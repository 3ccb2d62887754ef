"""Gradient clipping by the global norm; a norm that is not finite is reported, not applied."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: one call for many tensors, as torch.optim itself does it

import math
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class GradNorm:
    """The gradients' norm before clipping, and the factor they were multiplied by."""

    norm: float
    factor: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


@torch.no_grad()
def tensor_norms(tensors: list[Tensor]) -> list[Float[Tensor, ""]]:
    """Return the 2-norm of each tensor, in float32 whatever its type."""
    return list(torch._foreach_norm(tensors, 2.0, torch.float32)) if tensors else []


@torch.no_grad()
def scale_gradients(grads: list[Tensor], *, norm: float, max_norm: float) -> GradNorm:
    """Clip gradients of global norm ``norm`` in place, to at most ``max_norm``.

    ``math.inf`` changes nothing.
    """
    if not math.isfinite(norm) or norm <= max_norm:
        return GradNorm(norm, 1.0)
    factor = max_norm / (norm + 1e-6)
    if grads:
        torch._foreach_mul_(grads, factor)
    return GradNorm(norm, factor)
