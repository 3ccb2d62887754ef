"""Crew: the ranks that hold slices of the same matrices; their tokens meet there and part again.

Letters: t tokens held here, T tokens of the crew, D model dim.
"""

from typing import Protocol, runtime_checkable

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.packing import Packing


@runtime_checkable
class Crew(Protocol):
    """See the module's first lines. Each rank reads all rows and makes a part of each answer."""

    def meet(self, x: Float[Tensor, "t D"], *, packing: Packing) -> Float[Tensor, "T D"]:
        """Return the rows of every rank of the crew (``packing.met``), in order."""
        ...

    def part(self, y: Float[Tensor, "T D"], *, packing: Packing) -> Float[Tensor, "t D"]:
        """Add up what the ranks made of each row; return the rows held here (``packing.own``)."""
        ...


class Solo:
    """One rank holds whole matrices."""

    def meet(self, x: Float[Tensor, "T D"], *, packing: Packing) -> Float[Tensor, "T D"]:
        del packing
        return x

    def part(self, y: Float[Tensor, "T D"], *, packing: Packing) -> Float[Tensor, "T D"]:
        del packing
        return y
