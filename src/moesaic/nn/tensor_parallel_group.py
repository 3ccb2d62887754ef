"""Tensor parallel group: the ranks that share the matrices of a layer, with sequence parallelism.

Letters: t tokens of this rank, T tokens of the group, D model dim.
"""

from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.packing import Packing


@runtime_checkable
class TensorParallelGroup(Protocol):
    """Collectives around sharded matrices: each rank reads all rows and returns partial sums."""

    def all_gather_tokens(
        self, x: Float[Tensor, "t D"], packing: Packing, /
    ) -> Float[Tensor, "T D"]:
        """Return the rows of every rank of the group (``packing.gathered_tokens``), in order."""
        ...

    def reduce_scatter_tokens(
        self, y: Float[Tensor, "T D"], packing: Packing, /
    ) -> Float[Tensor, "t D"]:
        """Sum each row over the ranks; return this rank's rows (``packing.local_tokens``)."""
        ...


class NoTensorParallel:
    """Each rank has whole matrices: both collectives return their input."""

    def all_gather_tokens(
        self, x: Float[Tensor, "T D"], _packing: Packing, /
    ) -> Float[Tensor, "T D"]:
        return x

    def reduce_scatter_tokens(
        self, y: Float[Tensor, "T D"], _packing: Packing, /
    ) -> Float[Tensor, "T D"]:
        return y
