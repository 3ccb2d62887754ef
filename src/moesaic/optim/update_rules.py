"""Update rules of optimizers: AdamW and Muon.

AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

Muon: momentum, orthogonalized, for weight matrices and stacked expert matrices. K. Jordan et al.
2024 (kellerjordan.github.io/posts/muon); decay and update size for larger runs: Liu et al. 2025,
arXiv:2502.16982. All matrices of one shape, those of experts included, are stacked and
orthogonalized by one chain of batched products.

Letters: B stacked matrices, M rows, N columns.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: one call for many tensors, as torch.optim itself does it
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch.optim.adamw import adamw

from moesaic.core.shapes import Float, Tensor
from moesaic.ops.adamw import AdamWSettings, AdamWTensor
from moesaic.ops.kernel_selection import REAL_TENSOR_TYPES, select_adamw
from moesaic.optim.group_update import GroupUpdate

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True, slots=True)
class AdamWRule:
    """State per parameter: ``exp_avg`` and ``exp_avg_sq`` of its shape, ``step`` a scalar."""

    elementwise: ClassVar[bool] = True
    betas: tuple[float, float]
    eps: float

    @property
    def state_blocks(self) -> Mapping[str, int]:
        return {}

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
            "step": torch.zeros((), device=parameter.device),
        }

    def apply(self, update: GroupUpdate) -> None:
        if all(type(p) in REAL_TENSOR_TYPES and p.device.type == "cpu" for p in update.params):
            self._apply_on_cpu(update)
        else:
            self._apply_by_torch(update)
            update.round_masters()

    def _apply_on_cpu(self, update: GroupUpdate) -> None:
        settings = AdamWSettings(update.lr, self.betas, self.eps, update.weight_decay)
        torch._foreach_add_([state["step"] for state in update.states], 1)
        at = cache(settings.factors)
        select_adamw()(
            [
                AdamWTensor(
                    param,
                    grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    at(float(state["step"])),
                    narrow,
                )
                for param, grad, state, narrow in zip(
                    update.params, update.grads, update.states, update.narrow, strict=True
                )
            ]
        )

    def _apply_by_torch(self, update: GroupUpdate) -> None:
        fused = update.params[0].device.type in FUSED_DEVICES
        adamw(
            list(update.params),
            update.float_grads(),
            [state["exp_avg"] for state in update.states],
            [state["exp_avg_sq"] for state in update.states],
            [],
            [state["step"] for state in update.states],
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=update.lr,
            weight_decay=update.weight_decay,
            eps=self.eps,
            maximize=False,
        )


# Jordan's quintic a*x + b*x^3 + c*x^5: singular values end near 1 (0.7 to 1.2), and small ones
# grow by 3.44 per step
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, slots=True)
class MuonRule:
    """State per parameter: ``momentum``, of its shape.

    ``scale(rows, columns)`` is the factor on the orthogonal update. Expert weights ``[E, M, N]``
    are E matrices, each orthogonalized by itself, and so are the maps of a fused matrix (queries,
    keys and values; gate and value): orthogonalized as one, a small map would get the rest of the
    others' update.
    """

    elementwise: ClassVar[bool] = False
    momentum: float
    steps: int
    scale: Callable[[int, int], float]

    @property
    def state_blocks(self) -> Mapping[str, int]:
        return {}

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameter)}

    def apply(self, update: GroupUpdate) -> None:
        params, grads = list(update.params), update.float_grads()
        buffers = [state["momentum"] for state in update.states]
        torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        directions = torch._foreach_lerp(grads, buffers, self.momentum)  # Nesterov
        torch._foreach_mul_(params, 1 - update.lr * update.weight_decay)
        named = list(zip(update.names, directions, strict=True))
        if update.sharding is None:
            pairs = ((each, update.fused.get(name, ())) for name, each in named)
            self._orthogonalize([one for each, widths in pairs for one in split_maps(each, widths)])
        else:
            function = self._orthogonalize
            update.sharding.update_maps(dict(named), fused=update.fused, function=function)
        torch._foreach_add_(params, directions, alpha=-update.lr)
        update.round_masters()

    def _orthogonalize(self, maps: Sequence[Tensor]) -> None:
        """Replace each map by its scaled orthogonal update, in place; one batch for each shape."""
        for indices in group_by_matrix_shape(maps).values():
            same_shape = [maps[i] for i in indices]
            updates = orthogonalize(same_shape, steps=self.steps)
            torch._foreach_mul_(updates, self.scale(*updates[0].shape[-2:]))
            torch._foreach_copy_(same_shape, updates)


def split_maps(matrix: Float[Tensor, "*E M N"], widths: Sequence[int]) -> list[Tensor]:
    """Return views of the maps in a matrix [out, in] or expert weights [E, in, out], by widths."""
    return list(matrix.split(list(widths), 0 if matrix.ndim == 2 else -1)) if widths else [matrix]


def group_by_matrix_shape(tensors: Sequence[Tensor]) -> dict[tuple[int, int], list[int]]:
    """Group the indices of ``tensors`` by the shape of their matrices."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.shape[-2], tensor.shape[-1]].append(index)
    return dict(groups)


def orthogonalize(tensors: Sequence[Tensor], *, steps: int) -> list[Tensor]:
    """Orthogonalize every matrix of every tensor ``[M, N]`` or ``[E, M, N]`` in one batch."""
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
    # Gram matrices need fewer FLOPs for long rows, and the precision of float32
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
    commute, so ``g -> p g p``, and the product of all steps is multiplied with x once.
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
