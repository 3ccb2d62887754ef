"""Packing: a padded batch as one sequence of its real tokens, and back.

Norms, projections and experts see [T, D] rows without padding; only attention needs [B, S].

Letters: B rows, S length, T real tokens, C any width.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.copies import copy_without_waiting
from moesaic.core.shapes import Bool, Float, Int, Tensor

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive tokens of a row, from ``position``; ``start`` is their index in a context rank.

    Python integers, so that context parallelism plans attention without a device synchronization.
    """

    row: int
    position: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class TokenPartition:
    """How the tokens of a batch are partitioned over the ranks that share its rows.

    ``sizes`` are the tokens of each rank. ``tensor_ranks`` consecutive ranks are a tensor parallel
    group, which is one rank of context parallelism: its tokens are gathered around matrices, while
    context ranks exchange keys and values in attention; ``spans`` are the tokens of each.
    """

    sizes: tuple[int, ...]
    rank: int = 0
    tensor_ranks: int = 1
    spans: tuple[tuple[TokenSpan, ...], ...] = ()
    _made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what ``make`` returned for this key first: layers share what a batch decides."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def local_tokens(self) -> slice:
        """The tokens of this rank."""
        return _slice_of(self.sizes, self.rank)

    @property
    def context_rank(self) -> int:
        """The context rank that this rank belongs to."""
        return self.rank // self.tensor_ranks

    @property
    def context_sizes(self) -> tuple[int, ...]:
        """The number of tokens of each context rank."""
        parts = range(0, len(self.sizes), self.tensor_ranks)
        return tuple(sum(self.sizes[start : start + self.tensor_ranks]) for start in parts)

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        """The number of tokens of each rank of this tensor parallel group."""
        first = self.context_rank * self.tensor_ranks
        return self.sizes[first : first + self.tensor_ranks]

    @property
    def gathered_tokens(self) -> slice:
        """The tokens of this tensor parallel group."""
        return _slice_of(self.context_sizes, self.context_rank)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the T real tokens of a [B, S] batch are, and which of them this rank has.

    ``row`` and ``position`` are each token's batch row and its index in it; ``index`` is
    ``row * S + position``. ``mask`` is None where nothing is padded: packing is then a reshape, if
    the tokens are ``ordered`` row by row. ``partition`` is None where this rank has all tokens.
    ``host`` is the packing in host memory that it was copied from.
    """

    rows: int
    length: int
    index: Int[Tensor, "T"]
    row: Int[Tensor, "T"]
    position: Int[Tensor, "T"]
    mask: Bool[Tensor, "B S"] | None
    partition: TokenPartition | None = None
    ordered: bool = True
    host: "Packing | None" = None

    @staticmethod
    def from_mask(real: Bool[Tensor, "B S"]) -> "Packing":
        """Return the packing of a mask that is true at real tokens."""
        rows, length = real.shape
        index = real.flatten().nonzero()[:, 0]
        full = index.numel() == real.numel()
        row = torch.div(index, max(length, 1), rounding_mode="floor")
        return Packing(rows, length, index, row, index - row * length, None if full else real)

    @staticmethod
    def single(rows: int, *, device: torch.device) -> "Packing":
        """Return the packing of one token in each row."""
        index = torch.arange(rows, device=device)
        return Packing(rows, 1, index, index, torch.zeros_like(index), None)

    @staticmethod
    def from_lengths(lengths: Int[Tensor, "B"], *, length: int) -> "Packing":
        """Return the packing of rows of which the first ``lengths`` of ``length`` are real."""
        return Packing.from_mask(torch.arange(length, device=lengths.device) < lengths[:, None])

    def to(self, device: torch.device) -> "Packing":
        """Return the same packing on ``device``; the host does not wait for the copies."""
        if self.index.device == device:
            return self
        return replace(
            self,
            index=copy_without_waiting(self.index, device),
            row=copy_without_waiting(self.row, device),
            position=copy_without_waiting(self.position, device),
            mask=None if self.mask is None else copy_without_waiting(self.mask, device),
            host=self if self.index.device.type == "cpu" else self.host,
        )

    @property
    def num_tokens(self) -> int:
        return self.index.numel()

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        """The number of real tokens of each row."""
        if self.mask is None:
            return torch.full((self.rows,), self.length, device=self.index.device)
        return self.mask.sum(1)

    @property
    def local_tokens(self) -> slice:
        """The tokens of this rank."""
        return slice(0, self.num_tokens) if self.partition is None else self.partition.local_tokens

    @property
    def gathered_tokens(self) -> slice:
        """The tokens of this rank's tensor parallel group."""
        return (
            slice(0, self.num_tokens) if self.partition is None else self.partition.gathered_tokens
        )

    @property
    def key_mask(self) -> Bool[Tensor, "B 1 1 S"] | None:
        """The attention mask of these tokens as keys; None where nothing is padded.

        In a row without tokens the first padding (zeros) is allowed, so that no softmax is empty.
        """
        if self.mask is None:
            return None
        seen = self.mask.clone()
        seen[:, 0] |= ~seen.any(1)
        return seen[:, None, None]

    def pack(self, padded: Float[Tensor, "B S C"]) -> Float[Tensor, "T C"]:
        """Return the real tokens of a padded tensor."""
        flat = padded.reshape(self.rows * self.length, padded.shape[-1])
        return flat if self.is_reshape else _GatherRows.apply(flat, self.index)

    def pad(self, packed: Float[Tensor, "T C"]) -> Float[Tensor, "B S C"]:
        """Return packed tokens in rows; padding is zero."""
        if not self.is_reshape:
            packed = _ScatterRows.apply(packed, self.index, self.rows * self.length)
        return packed.view(self.rows, self.length, packed.shape[-1])

    @property
    def is_single(self) -> bool:
        """Whether each row has one token, and this rank has them all, in order."""
        return self.length == 1 and self.partition is None and self.is_reshape

    @property
    def is_reshape(self) -> bool:
        """Whether packing is a reshape: nothing is padded, tokens are ordered row by row."""
        return self.mask is None and self.ordered


def _slice_of(sizes: tuple[int, ...], index: int) -> slice:
    start = sum(sizes[:index])
    return slice(start, start + sizes[index])


class _GatherRows(torch.autograd.Function):
    """Gather of distinct rows: its gradient is a copy, not an accumulation."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.size = index, flat.shape[0]
        return flat.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grads[0]
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, ctx.index, grad), None


class _ScatterRows(torch.autograd.Function):
    """Scatter to distinct rows of zeros."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.index = index
        return packed.new_zeros(size, packed.shape[1]).index_copy_(0, index, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].index_select(0, ctx.index), None, None
