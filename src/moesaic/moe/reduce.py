"""Reduce: how counts of one rank become counts of all ranks that share a batch.

The convention of the whole house: a rank's loss is its *share*. Summed over ranks the shares are
the loss of the whole batch, and gradients summed over ranks are its gradient. A mean over tokens is
therefore a local sum divided by the global count, and any constant (the load of an expert) is
global. That holds for cross-entropy and for every loss in a ``Record``; nothing is divided by the
number of ranks.

Letters: C counters.
"""

from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Int, Tensor


@runtime_checkable
class Reduce(Protocol):
    """Sums counters over the ranks that share a batch. Every rank calls it equally often."""

    def __call__(self, counts: Int[Tensor, "C"]) -> Int[Tensor, "C"]: ...


class LocalReduce:
    """One rank holds the whole batch."""

    def __call__(self, counts: Int[Tensor, "C"]) -> Int[Tensor, "C"]:
        return counts
