"""Batch group: the ranks that hold one batch; sums and gathers routing data over them.

A rank's loss is its *share* of the global loss: summed over ranks, the shares are the loss of the
batch, and the gradients its gradient. A mean over tokens is therefore a local sum divided by the
global count, and constants such as the load of an expert are global. That holds for cross-entropy
and for every loss in a ``RoutingRecord``; nothing is divided by the number of ranks.

Letters: C counters, B rows of this rank, N edges.
"""

from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Bool, Shaped, Tensor
from moesaic.moe.edge_queues import CapacityOf, QueuedEdges, keep_first


@runtime_checkable
class BatchGroup(Protocol):
    """Collectives over the ranks of a batch; all ranks make the same calls in the same order."""

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        """Return the sum over ranks."""
        ...

    def sum_rows(self, counts: Shaped[Tensor, "B C"]) -> Shaped[Tensor, "B C"]:
        """Return the sum over the ranks that hold tokens of the same rows of the batch."""
        ...

    def keep_first(self, edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
        """Return which edges are within the capacity of their expert."""
        ...


class SingleRankBatch:
    """The batch group of one rank that holds the whole batch."""

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        return counts

    def sum_rows(self, counts: Shaped[Tensor, "B C"]) -> Shaped[Tensor, "B C"]:
        return counts

    def keep_first(self, edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
        return keep_first(edges, capacity=capacity)
