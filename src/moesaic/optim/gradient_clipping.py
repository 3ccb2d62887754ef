"""Gradient clipping by the global norm; a norm that is not finite is reported, not applied."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: one call for many tensors, as torch.optim itself does it

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

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
def tensor_norms(tensors: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
    """Return the 2-norm of each tensor, in float32 whatever its type.

    That of expert weights ``[E, M, N]`` is the norm of the norms of the experts: with the same bits
    where experts without tokens are left out.
    """
    parts = [list(t) if t.ndim == 3 and len(t) else [t] for t in tensors]
    flat = [part for each in parts for part in each]
    norms = iter(torch._foreach_norm(flat, 2.0, torch.float32) if flat else ())
    return [norm_of_norms(list(islice(norms, len(each)))) for each in parts]


def norm_of_norms(norms: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Return the 2-norm of the values of all tensors with these norms."""
    return norms[0] if len(norms) == 1 else torch.stack(list(norms)).norm()


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
