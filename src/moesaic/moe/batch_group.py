"""Ranks: how what one rank counts becomes what all ranks that share a batch count.

The convention of the whole house: a rank's loss is its *share*. Summed over ranks the shares are
the loss of the whole batch, and gradients summed over ranks are its gradient. A mean over tokens is
therefore a local sum divided by the global count, and any constant (the load of an expert) is
global. That holds for cross-entropy and for every loss in a ``RoutingRecord``; nothing is divided by the
number of ranks.

Letters: C counters, N rows of this rank, M rows of all ranks.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Int, Shaped, Tensor


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """The rows of every rank, in rank order, and where this rank's begin."""

    rows: Int[Tensor, "M C"]
    start: int


@runtime_checkable
class BatchGroup(Protocol):
    """The ranks that share a batch. Every rank makes the same calls in the same order."""

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        """Return the sum over ranks."""
        ...

    def gather(self, rows: Int[Tensor, "N C"]) -> GatheredRows:
        """Return the rows of all ranks; each may have another number of them."""
        ...


class SingleRankBatch:
    """One rank holds the whole batch."""

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        return counts

    def gather(self, rows: Int[Tensor, "N C"]) -> GatheredRows:
        return GatheredRows(rows, 0)
