"""Weight transfers: bring weights to where an update computes, and back; beside a GPU.

An elementwise update runs on the host, so weights of the device come to it, part after part: the
next part comes, and the one before returns, while the host updates one. Weights that are on a tier
themselves go to the device where an update runs there. Narrow weights without a master cross in
float32 and are rounded on the device, where that is faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.named_copies import NamedCopies
from moesaic.memory.tensor_store import Access, FetchedTensors, Part, Place, rows_of
from moesaic.optim.tiered_states import ParameterRows

WriteBack = Callable[[ParameterRows, Tensor, Tensor], None]  # rows, their weights, new values


def local_rows(rows: ParameterRows) -> Tensor:
    """Return the weights of some rows of this rank's shard."""
    return rows_of(local_tensor(rows.parameter), rows.part)


@dataclass(slots=True)
class WeightTransfers:
    """Transfers through ``copies``; None: updates compute where the weights are.

    ``at_rest`` are the parameters that are on the host themselves when they are updated.
    ``has_master`` says whether the float32 values of a parameter are in its state: then its weights
    are written without having been read.
    """

    write_back: WriteBack
    has_master: Callable[[Tensor], bool]
    copies: NamedCopies | None = None
    at_rest: frozenset[str] = frozenset()
    _coming: dict[Part, FetchedTensors] = field(default_factory=dict)

    def fetch(
        self, members: Sequence[ParameterRows], *, place: Place, access: Access
    ) -> FetchedTensors:
        """Bring the weights of some rows to ``place``: views where they are there."""
        each = [
            self._coming.pop(rows.part, None) or self._fetch(rows, place=place, access=access)
            for rows in members
        ]

        def release() -> None:
            for fetched in each:
                fetched.release()

        return FetchedTensors(lambda: [t for fetched in each for t in fetched.wait()], release)

    def prefetch(self, members: Sequence[ParameterRows], *, place: Place) -> None:
        """Start to bring the weights of the update that comes next."""
        for rows in members if self.copies is not None else ():
            if rows.part not in self._coming:
                self._coming[rows.part] = self._fetch(rows, place=place, access=Access.UPDATE)

    def discard(self) -> None:
        """Drop what an interrupted step has fetched."""
        self._coming = {}

    def join(self) -> None:
        """Have the device compute with the updated weights from now on."""
        if self.copies is not None:
            self.copies.join()

    @torch.no_grad()
    def _fetch(self, rows: ParameterRows, *, place: Place, access: Access) -> FetchedTensors:
        weights, name = local_rows(rows), rows.part.name
        copies, to_host = self.copies, place is Place.HOST
        if copies is None or to_host == (name in self.at_rest):
            return FetchedTensors(lambda: [weights], lambda: None)
        is_rounded = to_host and weights.dtype != torch.float32 and not self.has_master(weights)
        crossing = weights.float() if is_rounded else weights
        if access is Access.UPDATE and self.has_master(weights):
            access = Access.REPLACE
        fetched = copies.fetch([(name, crossing)], place=place, access=access)

        def release() -> None:
            fetched.release()
            if is_rounded and access is Access.UPDATE:
                copies.join()
                self.write_back(rows, weights, crossing)

        return FetchedTensors(fetched.wait, release)
