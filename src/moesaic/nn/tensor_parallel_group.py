"""Crew: the ranks that hold slices of the same matrices; their tokens meet there and part again.

Letters: t tokens held here, T tokens of the crew, D model dim.
"""

from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.packing import Packing


@runtime_checkable
class TensorParallelGroup(Protocol):
    """See the module's first lines. Each rank reads all rows and makes a part of each answer."""

    def all_gather_tokens(
        self, x: Float[Tensor, "t D"], *, packing: Packing
    ) -> Float[Tensor, "T D"]:
        """Return the rows of every rank of the crew (``packing.met``), in order."""
        ...

    def reduce_scatter_tokens(
        self, y: Float[Tensor, "T D"], *, packing: Packing
    ) -> Float[Tensor, "t D"]:
        """Add up what the ranks made of each row; return the rows held here (``packing.own``)."""
        ...


class NoTensorParallel:
    """One rank holds whole matrices."""

    def all_gather_tokens(
        self, x: Float[Tensor, "T D"], *, packing: Packing
    ) -> Float[Tensor, "T D"]:
        del packing
        return x

    def reduce_scatter_tokens(
        self, y: Float[Tensor, "T D"], *, packing: Packing
    ) -> Float[Tensor, "T D"]:
        del packing
        return y
