"""Product-key memory: a table of n * n slots beside the feed-forward; a token reads a few of them.

Product keys find the best slots by scoring n row keys and n column keys.

Letters: T tokens, D model dim, n keys per side, b best of a side, m slots read, r rank of the core,
d key dim, P and V widths of the pre-values and of the values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.config import SparseLayer
from moesaic.moe.layer import MoEOutput
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.initializer import (
    CustomInitializers,
    Initializer,
    fan_in_std,
    normal_parameter,
)
from moesaic.nn.parameter_spec import FeedForwardShape, ParameterSpec


@dataclass(frozen=True, slots=True)
class SlotScores:
    """The slots that each token reads, best first; scores float32, in the autograd graph."""

    slot: Int[Tensor, "T m"]
    score: Float[Tensor, "T m"]


class ProductKeys(CustomInitializers):
    """Row and column keys, one query per rank and side, and the Tucker core."""

    def __init__(
        self, *, dim: int, keys_per_side: int, num_slots_read: int, rank: int, key_dim: int
    ) -> None:
        super().__init__()
        self.query = nn.Linear(dim, 2 * rank * key_dim, bias=False)
        self.row = normal_parameter(keys_per_side, key_dim, std=1.0)
        self.column = normal_parameter(keys_per_side, key_dim, std=1.0)
        self.core_change = normal_parameter(rank, rank, std=0.0)
        self.keys_per_side, self.num_slots_read, self.rank = keys_per_side, num_slots_read, rank

    def initializers(self) -> Mapping[str, Initializer]:
        return {
            "query.weight": Initializer(kind="router"),
            "row": Initializer(kind="router", std=1.0),
            "column": Initializer(kind="router", std=1.0),
            "core_change": Initializer(kind="router", std=0.0),
        }

    @property
    def core(self) -> Float[Tensor, "r r"]:
        """C, whose difference from 1 / r is the parameter."""
        return self.core_change.float() + 1 / self.rank

    def forward(self, x: Float[Tensor, "T D"]) -> SlotScores:
        """Return each token's best slots, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            query = F.linear(x.float(), self.query.weight.float())
            query = unit_rms(query.unflatten(-1, (2, self.rank, -1)))
            row, column = (
                torch.einsum("trd,nd->trn", side, unit_rms(key.float())) / key.shape[1] ** 0.5
                for side, key in zip(query.unbind(1), (self.row, self.column), strict=True)
            )
            return self._top_slots(row, column=column)

    def _top_slots(
        self, row: Float[Tensor, "T r n"], *, column: Float[Tensor, "T r n"]
    ) -> SlotScores:
        left, right = leading_singular_vectors(self.core.detach())
        best = min(self.num_slots_read, self.keys_per_side)
        rows = (left @ row.detach()).topk(best).indices
        columns = (right @ column.detach()).topk(best).indices
        row = row.gather(2, rows[:, None].expand(-1, self.rank, -1))
        column = column.gather(2, columns[:, None].expand(-1, self.rank, -1))
        scores = (self.core.t() @ row).transpose(1, 2) @ column  # [T, b, b]
        pair = scores.detach().flatten(1).topk(self.num_slots_read).indices
        row_key, column_key = rows.gather(1, pair // best), columns.gather(1, pair % best)
        slot = row_key * self.keys_per_side + column_key
        return SlotScores(slot, scores.flatten(1).gather(1, pair))


def leading_singular_vectors(
    core: Float[Tensor, "r r"],
) -> tuple[Float[Tensor, "r"], Float[Tensor, "r"]]:
    """Return the singular vectors of the largest singular value; the left one's sum is positive.

    The sign decides whether the best scores are the largest or the smallest. The released code
    keeps the sign of the previous step; this rule depends on the core alone.
    """
    left, _, right = torch.linalg.svd(core)
    sign = torch.where(left[:, 0].sum() < 0, -1.0, 1.0)
    return sign * left[:, 0], sign * right[0]


def unit_rms(x: Float[Tensor, "*N d"]) -> Float[Tensor, "*N d"]:
    """Return the vectors scaled to a root mean square of 1."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class ProductKeyMemory(SparseLayer):
    """``feed_forward(x) + W V^T((P W' x) * s)`` over m of n * n slots (UltraMemV2, 2508.18756).

    A slot is a row key and a column key. Its score is ``s = s_row^T C s_col``, where ``s_row`` and
    ``s_col`` [r] are the scores of its keys under r queries of the token and C is a learned
    Tucker core. From the paper: every block has a memory beside its feed-forward, a slot multiplies
    its pre-value (P) with the token before its value (V) is added, there is no activation and no
    balance loss, d = D / 2 and P : V = 1 : 3 with P + V = D / 4 (the defaults).

    As in the released code: queries and keys are normalised; scores pass through no softmax; W' and
    W are linear maps; the m best rows and columns are those under C's leading singular pair
    (UltraMem, 2411.12364), and the m best of their m * m pairs are read. Our reading: all ranks
    share the keys, scaled to a root mean square of 1 without gains; C starts as 1 / r throughout
    (there: at random around it); V starts so small that m of the largest scores of n * n add up to
    about a feed-forward's variance; there is one core, and no virtual slots. It routes nothing and
    returns no routing record.
    """

    count_label: ClassVar[str] = "memory"
    keys_per_side: int = Field(default=64, ge=1)
    slots: int = Field(default=16, ge=1)
    rank: int = Field(default=2, ge=1)
    key_dim: int | None = Field(default=None, ge=1)
    pre_dim: int | None = Field(default=None, ge=1)
    value_dim: int | None = Field(default=None, ge=1)

    def value_dims(self, dim: int) -> tuple[int, int]:
        """Return the widths P and V in a model of this dim."""
        return self.pre_dim or max(1, dim // 16), self.value_dim or max(1, 3 * dim // 16)

    def resolved_key_dim(self, dim: int) -> int:
        """Return the key dim d in a model of this dim."""
        return self.key_dim or max(1, dim // 2)

    def num_slots_read(self) -> int:
        """The number of slots that a token reads, at most all."""
        return min(self.slots, self.keys_per_side**2)

    def value_fan_in(self) -> float:
        """Return the variance of the weights that a token's values are summed with."""
        # the largest of n * n products of two normal scores
        largest = 2 * math.log(max(self.keys_per_side, 2))
        return self.num_slots_read() * largest**2

    def build(self, shape: FeedForwardShape, /) -> nn.Module:
        return MemoryLayer(self, shape)

    def parameter_specs(self, shape: FeedForwardShape, /) -> Sequence[ParameterSpec]:
        dim, slots = shape.dim, self.keys_per_side**2
        (pre, value), keys = self.value_dims(dim), self.resolved_key_dim(dim)
        share = self.num_slots_read() / slots
        return [
            *shape.parameter_specs(),
            ParameterSpec("router", (2 * self.rank * keys, dim)),
            *(
                ParameterSpec("router", (self.keys_per_side, keys), uses_per_token=self.rank)
                for _ in range(2)
            ),
            ParameterSpec("router", (self.rank, self.rank), uses_per_token=self.num_slots_read()),
            ParameterSpec("matrix", (pre, dim)),
            ParameterSpec("expert", (slots, pre), share),
            ParameterSpec("expert", (slots, value), share),
            ParameterSpec("matrix", (dim, value)),
        ]


class MemoryLayer(CustomInitializers):
    """The sum of a dense feed-forward and a product-key memory."""

    def __init__(self, config: ProductKeyMemory, shape: FeedForwardShape) -> None:
        super().__init__()
        dim, slots = shape.dim, config.keys_per_side**2
        pre, value = config.value_dims(dim)
        self.feed_forward = DenseFeedForward(shape.feed_forward, dim=dim, bias=shape.bias)
        self.keys = ProductKeys(
            dim=dim,
            keys_per_side=config.keys_per_side,
            num_slots_read=config.num_slots_read(),
            rank=config.rank,
            key_dim=config.resolved_key_dim(dim),
        )
        self.input_projection = nn.Linear(dim, pre, bias=False)
        self.pre_values = normal_parameter(slots, pre, std=fan_in_std(pre))
        self.values = normal_parameter(slots, value, std=fan_in_std(config.value_fan_in()))
        self.out = nn.Linear(value, dim, bias=False)
        self.config = config

    def initializers(self) -> Mapping[str, Initializer]:
        return {
            "pre_values": Initializer(kind="expert", fan_in=self.pre_values.shape[1]),
            "values": Initializer(kind="expert", fan_in=self.config.value_fan_in()),
        }

    def forward(
        self, x: Float[Tensor, "T D"], *, context: TokenContext, router_state: RouterState
    ) -> MoEOutput:
        del context
        return MoEOutput(self.feed_forward(x) + self.read_memory(x), None, router_state)

    def read_memory(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return the output of the memory."""
        best = self.keys(x)
        projected = self.input_projection(x).to(self.values.dtype)
        pre = F.embedding(best.slot, self.pre_values)
        weight = best.score * torch.einsum("tmp,tp->tm", pre, projected)
        weight = weight.to(self.values.dtype)
        value = F.embedding_bag(best.slot, self.values, per_sample_weights=weight, mode="sum")
        return self.out(value)
