"""AdamW's update rule: torch's own kernels, fused where they exist.

Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from moesaic.core.shapes import Tensor
from moesaic.optim.update import MatrixSharding

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
