"""AdamW's update rule: torch's own kernels, fused where they exist.

Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

Muon's update rule: momentum, made orthogonal, for weight matrices and banks of expert matrices.

K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon); decay and update size for larger runs: Liu et al. 2025,
arXiv:2502.16982. Matrices of one shape, the experts of every bank among them, are stacked and
orthogonalised by one chain of batched products.

Letters: B stacked matrices, M rows, N columns.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: one call for many tensors, as torch.optim itself does it
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from moesaic.core.shapes import Float, Tensor
from moesaic.optim.named_optimizer import MatrixSharding

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True, slots=True)
class AdamWRule:
    """State per parameter: ``exp_avg`` and ``exp_avg_sq`` of its shape, ``step`` a scalar."""

    betas: tuple[float, float]
    eps: float

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
            "step": torch.zeros((), device=parameter.device),
        }

    def apply(
        self,
        params: Sequence[Tensor],
        *,
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
        sharding: MatrixSharding,
    ) -> None:
        del sharding
        fused = params[0].device.type in FUSED_DEVICES
        adamw(
            list(params),
            list(grads),
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )


# Jordan's quintic a*x + b*x^3 + c*x^5: singular values end near 1 (0.7 to 1.2), and small ones
# grow by 3.44 per step
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, slots=True)
class MuonRule:
    """State per parameter: ``momentum``, of its shape.

    ``scale(rows, columns)`` is the factor on the orthogonal update. A bank ``[E, M, N]`` is E
    matrices; each is treated exactly as if it stood alone.
    """

    momentum: float
    steps: int
    scale: Callable[[int, int], float]

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameter)}

    def apply(
        self,
        params: Sequence[Tensor],
        *,
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
        sharding: MatrixSharding,
    ) -> None:
        buffers = [s["momentum"] for s in states]
        torch._foreach_lerp_(buffers, list(grads), 1 - self.momentum)
        directions = torch._foreach_lerp(list(grads), buffers, self.momentum)  # Nesterov
        torch._foreach_mul_(list(params), 1 - group["lr"] * group["weight_decay"])
        directions = sharding.all_gather_matrices(group["updated"], directions)
        for indices in group_by_matrix_shape(directions).values():
            names = [group["updated"][i] for i in indices]
            whole = [directions[i] for i in indices]
            updates = sharding.local_shards(names, orthogonalize(whole, steps=self.steps))
            alpha = -group["lr"] * self.scale(*whole[0].shape[-2:])
            torch._foreach_add_([params[i] for i in indices], updates, alpha=alpha)


def group_by_matrix_shape(tensors: Sequence[Tensor]) -> dict[tuple[int, int], list[int]]:
    """Group the indices of ``tensors`` by the shape of their matrices, whatever the bank size."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        found[tensor.shape[-2], tensor.shape[-1]].append(index)
    return dict(found)


def orthogonalize(tensors: Sequence[Tensor], *, steps: int) -> list[Tensor]:
    """Orthogonalise every matrix of every tensor ``[M, N]`` or ``[E, M, N]`` in one batch."""
    rows, columns = tensors[0].shape[-2:]
    stacks = [t.reshape(-1, rows, columns) for t in tensors]
    whole = stacks[0] if len(stacks) == 1 else torch.cat(stacks)
    parts = newton_schulz(whole, steps=steps).split([s.shape[0] for s in stacks])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def newton_schulz(matrices: Float[Tensor, "B M N"], *, steps: int) -> Float[Tensor, "B M N"]:
    """Push the singular values of each matrix towards 1, keeping its singular vectors.

    bfloat16 on a GPU, as published; float32 on a CPU, where it is the faster of the two.
    A zero matrix stays zero.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # through the Gram matrices it is fewer FLOPs for long rows, but it needs float32's precision
    through_gram = x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]
    x = (
        _newton_schulz_gram(x, steps=steps)
        if through_gram
        else _newton_schulz_direct(x, steps=steps)
    )
    return (x.mT if tall else x).to(matrices.dtype)


def _newton_schulz_direct(x: Float[Tensor, "B M N"], *, steps: int) -> Float[Tensor, "B M N"]:
    """Apply the quintic ``steps`` times, as published."""
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_gram(x: Float[Tensor, "B M N"], *, steps: int) -> Float[Tensor, "B M N"]:
    """The same, with all steps but the last product on ``[M, M]`` matrices.

    One step is ``x -> p x`` with p a polynomial of the Gram matrix g; p and g are symmetric and
    commute, so ``g -> p g p``, and the steps' product meets x once.
    """
    a, b, c = QUINTIC
    gram = x @ x.mT
    product = None
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ gram @ p
    return x if product is None else product @ x
