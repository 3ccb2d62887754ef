"""Memory: a table of n * n slots beside the feed-forward, of which a token reads a few.

Letters: T tokens, D model dim, n keys per side, m slots read, r rank of the core, d key dim,
P and V widths of the pre-values and of the values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.bodies.product_keys import ProductKeys
from moesaic.moe.bodies.shared import feed_forward_parameter_specs
from moesaic.moe.config import SparseLayer
from moesaic.moe.context import RouterState, TokenContext
from moesaic.moe.layer import MoEOutput
from moesaic.moe.pieces import ParameterSpec
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.start import CustomInitializers, Initializer


class ProductKeyMemory(SparseLayer):
    """``feed_forward(x) + W V^T((P W' x) * s)`` over m of n * n slots (UltraMemV2, 2508.18756).

    A slot is a row key and a column key. Its score is ``s = s_row^T C s_col``, where ``s_row`` and
    ``s_col`` [r] are the scores of its keys under r queries of the token and C is a learned
    Tucker core. From the paper: the memory stands beside the feed-forward of every block, a slot
    multiplies its pre-value (P) with the token before its value (V) is added, there is no
    activation and no balance loss, d = D / 2 and P : V = 1 : 3 with P + V = D / 4 (the defaults).

    As in the released code: queries and keys are normalised; scores pass through no softmax; W' and
    W are linear maps; the m best rows and columns are those under C's leading singular pair
    (UltraMem, 2411.12364), and the m best of their m * m pairs are read. Our reading: all ranks
    share the keys, scaled to a root mean square of 1 without gains; C starts as 1 / r throughout
    (there: at random around it); V starts so small that m of the largest scores of n * n add up to
    about a feed-forward's variance; there is one core, and no virtual slots. Nothing is routed, so
    there is no record of it.
    """

    count_label: ClassVar[str] = "memory"
    keys_per_side: int = Field(default=64, ge=1)
    slots: int = Field(default=16, ge=1)
    rank: int = Field(default=2, ge=1)
    key_dim: int | None = Field(default=None, ge=1)
    pre_dim: int | None = Field(default=None, ge=1)
    value_dim: int | None = Field(default=None, ge=1)

    def value_dims(self, dim: int) -> tuple[int, int]:
        """Widths P and V in a model of this dim."""
        return self.pre_dim or max(1, dim // 16), self.value_dim or max(1, 3 * dim // 16)

    def resolved_key_dim(self, dim: int) -> int:
        """Key dim d in a model of this dim."""
        return self.key_dim or max(1, dim // 2)

    def num_slots_read(self) -> int:
        """Slots that a token reads: no more than there are."""
        return min(self.slots, self.keys_per_side**2)

    def build(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> nn.Module:
        return MemoryLayer(self, feed_forward=feed_forward, dim=dim, bias=bias)

    def parameter_specs(self, *, feed_forward: FeedForwardConfig, dim: int, bias: bool) -> Sequence[ParameterSpec]:
        (pre, value), keys, slots = self.value_dims(dim), self.resolved_key_dim(dim), self.keys_per_side**2
        share = self.num_slots_read() / slots
        return [
            *feed_forward_parameter_specs(feed_forward, dim=dim, bias=bias),
            ParameterSpec("router", (2 * self.rank * keys, dim)),
            *(ParameterSpec("router", (self.keys_per_side, keys), uses_per_token=self.rank) for _ in range(2)),
            ParameterSpec("router", (self.rank, self.rank), uses_per_token=self.num_slots_read()),
            ParameterSpec("matrix", (pre, dim)),
            ParameterSpec("expert", (slots, pre), share),
            ParameterSpec("expert", (slots, value), share),
            ParameterSpec("matrix", (dim, value)),
        ]

    def saved_activations(self, *, feed_forward: FeedForwardConfig, dim: int) -> float:
        (pre, value), rank, read = self.value_dims(dim), self.rank, self.num_slots_read()
        best = min(read, self.keys_per_side)
        query = 2 * 2 * rank * self.resolved_key_dim(dim)  # before and after it is normalised
        grid = 3 * rank * best + 2 * 2 * rank * best  # both sides, one with C, and their places
        slots = read * (pre + 3 + 3 * 2)  # pre-values, three weights, places
        dense = feed_forward.activation.saved_activations * feed_forward.hidden
        return dense + query + grid + slots + pre + value


class MemoryLayer(CustomInitializers):
    """A dense feed-forward and the memory beside it, both added."""

    def __init__(
        self, config: ProductKeyMemory, *, feed_forward: FeedForwardConfig, dim: int, bias: bool
    ) -> None:
        super().__init__()
        (pre, value), slots = config.value_dims(dim), config.keys_per_side**2
        self.feed_forward = DenseFeedForward(feed_forward, dim=dim, bias=bias)
        self.keys = ProductKeys(
            dim=dim,
            keys_per_side=config.keys_per_side,
            num_slots_read=config.num_slots_read(),
            rank=config.rank,
            key_dim=config.resolved_key_dim(dim),
        )
        self.input_projection = nn.Linear(dim, pre, bias=False)
        self.pre_values = nn.Parameter(torch.empty(slots, pre))
        self.values = nn.Parameter(torch.empty(slots, value))
        self.out = nn.Linear(value, dim, bias=False)
        self.config = config

    def initializers(self) -> Mapping[str, Initializer]:
        config = self.config
        largest = 2 * math.log(max(config.keys_per_side, 2))  # of n * n products of two normal scores
        return {
            "pre_values": Initializer(kind="expert", fan_in=self.pre_values.shape[1]),
            "values": Initializer(kind="expert", fan_in=config.num_slots_read() * largest**2),
        }

    def forward(self, x: Float[Tensor, "T D"], *, context: TokenContext, router_state: RouterState) -> MoEOutput:
        del context
        return MoEOutput(self.feed_forward(x) + self.read_memory(x), None, router_state)

    def read_memory(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return what the memory adds."""
        found = self.keys(x)
        reads = self.input_projection(x).to(self.values.dtype)
        pre = F.embedding(found.slot, self.pre_values)
        weight = found.score * torch.einsum("tmp,tp->tm", pre, reads)
        held = F.embedding_bag(found.slot, self.values, per_sample_weights=weight, mode="sum")
        return self.out(held)
