"""Batch group: the ranks that hold one batch; sums and gathers routing data over them.

A rank's loss is its *share* of the global loss: summed over ranks, the shares are the loss of the
batch, and the gradients its gradient. A mean over tokens is therefore a local sum divided by the
global count, and constants such as the load of an expert are global. That holds for cross-entropy
and for every loss in a ``RoutingRecord``; nothing is divided by the number of ranks.

Letters: C counters, N rows of this rank, M rows of all ranks.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Bool, Int, Shaped, Tensor
from moesaic.moe.edge_queues import CapacityOf, QueuedEdges, keep_first


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """The rows of all ranks in rank order, and the index of this rank's first row."""

    rows: Int[Tensor, "M C"]
    start: int


@runtime_checkable
class BatchGroup(Protocol):
    """Collectives over the ranks of a batch; all ranks make the same calls in the same order."""

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        """Return the sum over ranks."""
        ...

    def gather(self, rows: Int[Tensor, "N C"]) -> GatheredRows:
        """Return the rows of all ranks, whose numbers may differ."""
        ...

    def keep_first(self, edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
        """Return which edges are within the capacity of their expert."""
        ...


class SingleRankBatch:
    """The batch group of one rank that holds the whole batch."""

    def sum(self, counts: Shaped[Tensor, "C"]) -> Shaped[Tensor, "C"]:
        return counts

    def gather(self, rows: Int[Tensor, "N C"]) -> GatheredRows:
        return GatheredRows(rows, 0)

    def keep_first(self, edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
        return keep_first(edges, capacity=capacity)
