"""Soft MoE: experts process weighted mixtures of a row's tokens, without selection or drops.

Letters: T tokens, D model dim, B rows, n tokens of the longest row, E experts, S slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.config import SparseLayer
from moesaic.moe.experts import Expert, ExpertShape, FeedForwardExpert
from moesaic.moe.layer import MoEOutput
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.nn.initializer import (
    CustomInitializers,
    Initializer,
    normal_parameter,
    router_std,
)
from moesaic.nn.parameter_spec import FeedForwardShape, ParameterSpec
from moesaic.ops.permute import RowGroups


class SoftMoE(SparseLayer):
    """Soft MoE (2308.00951, section 2.1; normalised as in its section 2.3).

    Every expert has ``slots`` slots. The input of a slot is a convex combination of a row's tokens
    (softmax over tokens), the output for a token one of all slots' outputs (softmax over slots).
    Both use the logits ``scale * cos(token, slot)`` with a learned scale. It routes nothing, so it
    has no routing record, balance or limit.

    Not causal: a token's output depends on all tokens of its row. Not allowed in a decoder.
    ``assumed_length`` is the row length from which FLOPs and bytes are counted; it changes nothing
    else.
    """

    experts: int = Field(ge=1)
    slots: int = Field(default=1, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    expert: Expert = FeedForwardExpert()
    assumed_length: int = Field(default=32, ge=1)

    @property
    def causal(self) -> bool:
        return False

    @property
    def needs_whole_rows(self) -> bool:
        return True

    @property
    def num_slots(self) -> int:
        return self.experts * self.slots

    def expert_shape(self, shape: FeedForwardShape) -> ExpertShape:
        """Return the shape of the experts, given that of the dense feed-forward."""
        feed = shape.feed_forward.replace(hidden=self.hidden or shape.hidden)
        return ExpertShape(self.experts, shape.dim, feed, shape.bias)

    def build(self, shape: FeedForwardShape, /) -> nn.Module:
        return SoftMoELayer(self, self.expert_shape(shape))

    def parameter_specs(self, shape: FeedForwardShape, /) -> Sequence[ParameterSpec]:
        active = min(1.0, self.slots / self.assumed_length)
        return [
            ParameterSpec("router", (self.num_slots, shape.dim)),
            ParameterSpec("norm", (1,)),
            *self.expert.parameter_specs(self.expert_shape(shape), active_fraction=active),
        ]


class SoftMoELayer(CustomInitializers):
    """Slot directions [S, D], expert by expert, the logit scale, and the experts."""

    def __init__(self, config: SoftMoE, size: ExpertShape) -> None:
        super().__init__()
        self.directions = normal_parameter(config.num_slots, size.dim, std=router_std(size.dim))
        self.scale = nn.Parameter(torch.ones(1))
        self.experts = config.expert.build(size)
        self.num_experts = config.experts

    def initializers(self) -> Mapping[str, Initializer]:
        return {"directions": Initializer(kind="router")}

    def forward(
        self, x: Float[Tensor, "T D"], *, context: TokenContext, router_state: RouterState
    ) -> MoEOutput:
        if not len(x):
            return MoEOutput(x, None, router_state)
        rows = PaddedRows.from_context(context)
        logits = self.logits(x)
        dispatch = rows.pad(logits, fill=float("-inf")).softmax(1).to(x.dtype)
        slots = self._apply_experts(dispatch.transpose(1, 2) @ rows.pad(x, fill=0.0))
        out = rows.pad(logits.softmax(-1).to(x.dtype), fill=0.0) @ slots
        return MoEOutput(out.flatten(0, 1).index_select(0, rows.index), None, router_state)

    def logits(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T S"]:
        """Return the float32 logits of all tokens and slots."""
        with torch.autocast(x.device.type, enabled=False):
            slots = F.normalize(self.directions.float(), dim=-1) * self.scale.float()
            return F.normalize(x.float(), dim=-1) @ slots.t()

    def _apply_experts(self, slots: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        rows, _, dim = slots.shape
        by_expert = slots.unflatten(1, (self.num_experts, -1)).transpose(0, 1)
        groups = _even_groups(self.num_experts, by_expert[0].shape.numel() // dim, slots)
        y = self.experts(by_expert.reshape(-1, dim), groups=groups)
        return y.view(self.num_experts, rows, -1, dim).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Padded layout [B, n] of packed tokens, for rows with tokens; ``index`` locates each token."""

    rows: int
    length: int
    index: Int[Tensor, "T"]

    @staticmethod
    def from_context(context: TokenContext) -> "PaddedRows":
        """Return the layout of a batch's tokens; waits for the device to read its size."""
        rows, row = torch.unique(context.row, return_inverse=True)
        length = int(context.position.max()) + 1
        return PaddedRows(rows.numel(), length, row * length + context.position)

    def pad(self, packed: Float[Tensor, "T C"], *, fill: float) -> Float[Tensor, "B n C"]:
        """Return the padded tokens, with ``fill`` at padding."""
        empty = packed.new_full((self.rows * self.length, packed.shape[1]), fill)
        return empty.index_copy(0, self.index, packed).unflatten(0, (self.rows, -1))


def _even_groups(experts: int, each: int, like: Tensor) -> RowGroups:
    """Return the groups of sorted rows, ``each`` of them per expert."""
    order = torch.arange(experts * each, device=like.device)
    counts = torch.full((experts,), each, device=like.device)
    return RowGroups(order, order, counts, counts.cumsum(0).to(torch.int32))
