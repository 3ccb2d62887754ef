"""Packing: a padded batch as a stream of its real tokens, and the way back.

Norms, projections and experts see [T, D] rows without padding; only attention needs [B, S].

Letters: B rows, S length, T real tokens, C any width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Neighbouring tokens of one row, from ``position`` on; ``start`` is where their part has them.

    Plain numbers, so that who looks at whom is known without asking the device.
    """

    row: int
    position: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class TokenPartition:
    """How the tokens of a batch are dealt out to the ranks that share its rows.

    ``sizes`` are the tokens of each rank, ``lanes`` neighbouring ranks make one *part*: they hold
    slices of the same layers' matrices and meet in them (tensor parallel), while parts meet only
    where tokens look at each other (context parallel). ``runs`` are what each part holds.
    """

    sizes: tuple[int, ...]
    rank: int = 0
    tensor_ranks: int = 1
    spans: tuple[tuple[TokenSpan, ...], ...] = ()

    @property
    def local_tokens(self) -> slice:
        """The tokens of this rank."""
        return _slice_of(self.sizes, self.rank)

    @property
    def context_rank(self) -> int:
        """Which part this rank belongs to."""
        return self.rank // self.tensor_ranks

    @property
    def context_sizes(self) -> tuple[int, ...]:
        """The tokens of each part."""
        parts = range(0, len(self.sizes), self.tensor_ranks)
        return tuple(sum(self.sizes[start : start + self.tensor_ranks]) for start in parts)

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        """The tokens of each rank of this part."""
        first = self.context_rank * self.tensor_ranks
        return self.sizes[first : first + self.tensor_ranks]

    @property
    def gathered_tokens(self) -> slice:
        """The tokens of this rank's part."""
        return _slice_of(self.context_sizes, self.context_rank)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the T real tokens of a [B, S] batch are, and which of them are held here.

    ``row`` and ``position`` say each token's batch row and its place in it; ``index`` is
    ``row * S + position``. ``mask`` is None where nothing is padded: then packing is a reshape, if
    the tokens are ``ordered`` row by row. ``division`` is None where all tokens are held here.
    """

    rows: int
    length: int
    index: Int[Tensor, "T"]
    row: Int[Tensor, "T"]
    position: Int[Tensor, "T"]
    mask: Bool[Tensor, "B S"] | None
    partition: TokenPartition | None = None
    ordered: bool = True

    @staticmethod
    def from_mask(real: Bool[Tensor, "B S"]) -> "Packing":
        """Make the packing of a mask that is true at real tokens."""
        rows, length = real.shape
        index = real.flatten().nonzero()[:, 0]
        full = index.numel() == real.numel()
        row = torch.div(index, max(length, 1), rounding_mode="floor")
        return Packing(rows, length, index, row, index - row * length, None if full else real)

    @property
    def num_tokens(self) -> int:
        return self.index.numel()

    @property
    def local_tokens(self) -> slice:
        """Which tokens are held here."""
        return slice(0, self.num_tokens) if self.partition is None else self.partition.local_tokens

    @property
    def gathered_tokens(self) -> slice:
        """Which tokens meet in the matrices that this rank holds a slice of."""
        return (
            slice(0, self.num_tokens) if self.partition is None else self.partition.gathered_tokens
        )

    @property
    def key_mask(self) -> Bool[Tensor, "B 1 1 S"] | None:
        """What attention over these tokens may look at; None where nothing is padded.

        A row without any token looks at its first padding (zeros), so that no softmax is empty.
        """
        if self.mask is None:
            return None
        seen = self.mask.clone()
        seen[:, 0] |= ~seen.any(1)
        return seen[:, None, None]

    def pack(self, padded: Float[Tensor, "B S C"]) -> Float[Tensor, "T C"]:
        """Take the real tokens out of a padded tensor."""
        flat = padded.reshape(self.rows * self.length, padded.shape[-1])
        return flat if self._is_reshape else _GatherRows.apply(flat, self.index)

    def pad(self, packed: Float[Tensor, "T C"]) -> Float[Tensor, "B S C"]:
        """Put packed tokens back; padding becomes zero."""
        if not self._is_reshape:
            packed = _ScatterRows.apply(packed, self.index, self.rows * self.length)
        return packed.view(self.rows, self.length, packed.shape[-1])

    @property
    def _is_reshape(self) -> bool:
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
