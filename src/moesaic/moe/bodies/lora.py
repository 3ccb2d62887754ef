"""LoRA experts: one feed-forward that all share, and a low-rank change of it for each.

Letters: E experts, R rows, D model dim, F hidden width (2F before a gated activation), r rank.
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.bodies.shared import feed_forward_parameter_specs
from moesaic.moe.experts import Expert, ExpertModule, ExpertShape, as_autocast
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.start import CustomInitializers, Initializer
from moesaic.ops.choose import select_grouped_gemm
from moesaic.ops.group import RowGroups
from moesaic.ops.grouped import zero_rows_past_groups
from moesaic.ops.product import grouped_matmul


class LoRAExpert(Expert):
    """Expert e multiplies with ``W + alpha / rank * A_e B_e`` at both products (LoRA, 2106.09685).

    W is one feed-forward for all experts, trained like any other (freezing it is the optimizer's
    affair); each ``B_e`` starts as zero, so all experts start as W. Mixtures of such changes
    are MoLoRA (2309.05444), there of a frozen pretrained W and merged softly. Biases belong to W.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)

    def build(self, size: ExpertShape) -> "LoRAExperts":
        return LoRAExperts(size, rank=self.rank, scale=self.alpha / self.rank)

    def parameter_specs(self, size: ExpertShape, *, active_fraction: float) -> Sequence[ParameterSpec]:
        experts, rank, feed = size.num_experts, self.rank, size.feed_forward
        width = feed.activation.width(feed.hidden)
        base = feed_forward_parameter_specs(feed, dim=size.dim, bias=size.bias)
        banks = ((size.dim, rank), (rank, width), (feed.hidden, rank), (rank, size.dim))
        return [
            *(ParameterSpec(piece.kind, piece.shape, uses_per_token=active_fraction * experts) for piece in base),
            *(ParameterSpec("expert", (experts, *shape), active_fraction) for shape in banks),
        ]

    def saved_activations(self, size: ExpertShape, *, edges: float, live_fraction: float = 1.0) -> float:
        del live_fraction  # rows of edges that lead nowhere are kept, too
        feed = size.feed_forward
        inner = feed.activation.saved_activations * feed.hidden + 2 * self.rank
        return edges * (2 * size.dim + inner + 4)


class LoRAExperts(ExpertModule, CustomInitializers):
    """``up_a`` [E, D, r], ``up_b`` [E, r, F], ``down_a`` [E, F, r], ``down_b`` [E, r, D]."""

    def __init__(self, size: ExpertShape, *, rank: int, scale: float) -> None:
        super().__init__()
        experts, feed = size.num_experts, size.feed_forward
        width = feed.activation.width(feed.hidden)
        self.base = DenseFeedForward(feed, dim=size.dim, bias=size.bias)
        self.up_a = nn.Parameter(torch.empty(experts, size.dim, rank))
        self.up_b = nn.Parameter(torch.empty(experts, rank, width))
        self.down_a = nn.Parameter(torch.empty(experts, feed.hidden, rank))
        self.down_b = nn.Parameter(torch.empty(experts, rank, size.dim))
        self.activation, self.scale = feed.activation, scale

    def initializers(self) -> Mapping[str, Initializer]:
        return {"up_b": Initializer(std=0.0), "down_b": Initializer(std=0.0)}

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        rows = as_autocast(rows)
        low = self._low_rank_product(rows, a=self.up_a, b=self.up_b, groups=groups)
        hidden = self.activation(self.base.up(rows) + low)
        low = self._low_rank_product(hidden, a=self.down_a, b=self.down_b, groups=groups)
        return zero_rows_past_groups(self.base.down(hidden) + low, offsets=groups.offsets)

    def _low_rank_product(self, rows: Tensor, *, a: Tensor, b: Tensor, groups: RowGroups) -> Tensor:
        engine = select_grouped_gemm(rows)
        low = grouped_matmul(rows, weight=a, groups=groups, gemm=engine)
        return self.scale * grouped_matmul(low, weight=b, groups=groups, gemm=engine)
