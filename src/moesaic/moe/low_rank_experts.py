"""Low-rank adapters of expert weights: LoRA (2106.09685) with factors of its own for every expert.

The products are grouped as those of the weights: no expert's weight or gradient is ever whole in
memory beside the frozen ones.

Letters: E experts, R rows, D model dim, F hidden width (G before a gated activation), r rank.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.experts import DirectExperts, ExpertAdapter, FunctionalExperts, GroupedExperts
from moesaic.nn.initializer import Initializer, fan_in_std, normal_parameter
from moesaic.ops.autocast import as_autocast
from moesaic.ops.grouped_gemm import (
    add_expert_bias,
    grouped_matmul,
    low_rank_product,
    zero_rows_past_groups,
)
from moesaic.ops.kernel_selection import select_grouped_gemm
from moesaic.ops.permute import RowGroups


class LowRankExperts(ExpertAdapter):
    """Adds ``scale * A_e B_e`` to ``up``, ``down`` or both of each expert e.

    ``up_a`` [E, D, r], ``up_b`` [E, r, G], ``down_a`` [E, F, r], ``down_b`` [E, r, D]; every B is
    zero at the start.
    """

    def __init__(
        self, experts: GroupedExperts, *, matrices: Collection[str], rank: int, scale: float
    ) -> None:
        super().__init__()
        self.scale, self.matrices = scale, tuple(matrices)
        for name in self.matrices:
            weight = experts.get_parameter(name)
            number, inputs, outputs = weight.shape
            with torch.device(weight.device):
                first = normal_parameter(number, inputs, rank, std=fan_in_std(inputs))
                self.register_parameter(f"{name}_a", first)
                second = normal_parameter(number, rank, outputs, std=0.0)
                self.register_parameter(f"{name}_b", second)

    def initializers(self) -> Mapping[str, Initializer]:
        started = {}
        for name in self.matrices:
            inputs = self.get_parameter(f"{name}_a").shape[1]
            started[f"{name}_a"] = Initializer("expert", std=fan_in_std(inputs))
            started[f"{name}_b"] = Initializer("expert", std=0.0)
        return started

    def over(self, experts: FunctionalExperts) -> "_WithLowRank":
        return _WithLowRank(experts, dict(self.named_parameters()), self.scale)


@dataclass(frozen=True, slots=True)
class _WithLowRank(DirectExperts):
    """Experts with the products of ``factors`` (``up_a``, ``up_b``, ...) added."""

    experts: FunctionalExperts
    factors: Mapping[str, nn.Parameter]
    scale: float

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        rows = as_autocast(rows)
        hidden = self.experts.activation(self._product(rows, "up", groups=groups))
        out = self._product(hidden, "down", groups=groups)
        return zero_rows_past_groups(out, offsets=groups.offsets)

    def _product(self, rows: Tensor, name: str, *, groups: RowGroups) -> Tensor:
        gemm, weights = select_grouped_gemm(rows), self.experts.weights
        weight, bias = (
            (weights.up, weights.up_bias) if name == "up" else (weights.down, weights.down_bias)
        )
        out = grouped_matmul(rows, weight=weight, groups=groups, gemm=gemm)
        add_expert_bias(out, bias, groups=groups)
        if f"{name}_a" not in self.factors:
            return out
        a, b = self.factors[f"{name}_a"], self.factors[f"{name}_b"]
        return out + low_rank_product(rows, a=a, b=b, scale=self.scale, groups=groups, gemm=gemm)
