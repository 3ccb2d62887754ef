"""Soft: experts that read mixtures of a row's tokens, so that nothing is chosen or dropped.

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
from moesaic.moe.parameter_spec import ParameterSpec
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.ops.permute import RowGroups


class SoftMoE(SparseLayer):
    """Soft MoE (2308.00951, section 2.1; normalised as in its section 2.3).

    Every expert has ``slots`` slots. A slot reads a convex combination of a row's tokens (softmax
    over tokens), and a token gets a convex combination of all slots' answers (softmax over slots).
    Both come of the logits ``scale * cos(token, slot)``, the scale learnt. Nothing is routed, so
    there is no record of it, no balance and no limit.

    Not causal: every token of a row reads all the others. A decoder refuses it. ``length`` is the
    row length that FLOPs and bytes are counted with, and changes nothing else.
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

    def expert_shape(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> ExpertShape:
        """Return the size of the experts in a model with this dense feed-forward."""
        hidden = self.hidden or feed_forward.hidden
        return ExpertShape(self.experts, dim, feed_forward.replace(hidden=hidden), bias)

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        size = self.expert_shape(feed_forward=feed_forward, dim=dim, bias=bias)
        return SoftMoELayer(self, size=size)

    def parameter_specs(
        self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool
    ) -> Sequence[ParameterSpec]:
        size = self.expert_shape(feed_forward=feed_forward, dim=dim, bias=bias)
        return [
            ParameterSpec("router", (self.num_slots, dim)),
            ParameterSpec("norm", (1,)),
            *self.expert.parameter_specs(
                size, active_fraction=min(1.0, self.slots / self.assumed_length)
            ),
        ]

    def saved_activations(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        size = self.expert_shape(feed_forward=feed_forward, dim=dim, bias=False)
        rows = self.num_slots / self.assumed_length
        weights = 3 * self.num_slots + 2
        return 2 * dim + weights + self.expert.saved_activations(size, edges=rows) + rows * dim


class SoftMoELayer(CustomInitializers):
    """The slots' directions [S, D], expert by expert, the scale, and the experts."""

    def __init__(self, config: SoftMoE, *, size: ExpertShape) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.empty(config.num_slots, size.dim))
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
        grid = PaddedRows.from_context(context)
        logits = self.logits(x)
        into = grid.pad(logits, fill=float("-inf")).softmax(1).to(x.dtype)
        answers = self._apply_experts(into.transpose(1, 2) @ grid.pad(x, fill=0.0))
        home = grid.pad(logits.softmax(-1).to(x.dtype), fill=0.0) @ answers
        return MoEOutput(home.flatten(0, 1).index_select(0, grid.index), None, router_state)

    def logits(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T S"]:
        """Return float32 logits of every token and slot."""
        with torch.autocast(x.device.type, enabled=False):
            slots = F.normalize(self.directions.float(), dim=-1) * self.scale.float()
            return F.normalize(x.float(), dim=-1) @ slots.t()

    def _apply_experts(self, slots: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        rows, _, dim = slots.shape
        sorted_ = slots.unflatten(1, (self.num_experts, -1)).transpose(0, 1)  # by expert
        each = sorted_[0].shape.numel() // dim
        y = self.experts(
            sorted_.reshape(-1, dim), groups=_even_groups(self.num_experts, each, slots)
        )
        return y.view(self.num_experts, rows, -1, dim).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Tokens as [B, n], one line for each row that has any. ``index`` is a token's place in it."""

    rows: int
    length: int
    index: Int[Tensor, "T"]

    @staticmethod
    def from_context(context: TokenContext) -> "PaddedRows":
        """Make the grid of a batch's tokens; their number has to come from the device."""
        held, line = torch.unique(context.row, return_inverse=True)
        length = int(context.position.max()) + 1
        return PaddedRows(held.numel(), length, line * length + context.position)

    def pad(self, packed: Float[Tensor, "T C"], *, fill: float) -> Float[Tensor, "B n C"]:
        """Put tokens in their places, and ``fill`` where there is none."""
        empty = packed.new_full((self.rows * self.length, packed.shape[1]), fill)
        return empty.index_copy(0, self.index, packed).unflatten(0, (self.rows, -1))


def _even_groups(experts: int, each: int, like: Tensor) -> RowGroups:
    """Rows that are sorted already, the same number of each expert."""
    order = torch.arange(experts * each, device=like.device)
    counts = torch.full((experts,), each, device=like.device)
    return RowGroups(order, order, counts, counts.cumsum(0).to(torch.int32))
