"""LoRA as a choice of what a run trains: low-rank adapters beside frozen matrices (2106.09685)."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.low_rank_experts import LowRankExperts
from moesaic.nn.adapter import LowRankLinear, adapter_name, add_adapter
from moesaic.parallel.adapter_choice import MatrixAdapter


class LoRA(MatrixAdapter):
    """Trains ``W + alpha / rank * B A`` with W frozen, for each matrix of ``targets``.

    A is [rank, inputs], drawn as other matrices are; B is [outputs, rank], zeros at the start. Of
    experts each has factors of its own. There is no dropout: of the products with expert weights
    none is possible that merging leaves equal (PEFT refuses it, too).
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / self.rank

    def adapt_experts(self, experts: GroupedExperts, matrices: list[str], *, path: str) -> None:
        del path
        experts.adapter = LowRankExperts(
            experts, matrices=matrices, rank=self.rank, scale=self.scale
        )

    def adapt_linear(self, linear: nn.Linear, *, path: str) -> None:
        del path
        add_adapter(linear, LowRankLinear(linear, rank=self.rank, scale=self.scale))

    def merged(
        self, weight: Float[Tensor, "*E M N"], *, name: str, adapter: Mapping[str, Tensor]
    ) -> Float[Tensor, "*E M N"]:
        if (first := adapter_name(name, "a")) not in adapter:
            return weight
        a, b = adapter[first].float(), adapter[adapter_name(name, "b")].float()
        product = a @ b if weight.dim() == 3 else b @ a
        return torch.add(weight.float(), product, alpha=self.scale)
