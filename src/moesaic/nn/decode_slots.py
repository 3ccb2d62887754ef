"""Decode slots: the places of the tokens decoded so far in the KV caches of all layers, by row.

Rows that continue one source (the beams of a search) share slots: a step appends the newest tokens
of all of them, and nothing is moved when a beam continues another one. Which slots a row reads is a
mask, made once per step for all layers. So reordering costs no copy of keys, and one product serves
all rows of a source.

Letters: B sources, k rows of each, R = B k rows, n newest tokens, S slots of a source, T tokens.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.nn.packing import Packing


class _OwnSlots(NamedTuple):
    shape: tuple[int, int, int]
    mask: Bool[Tensor, "R kn"]


@dataclass(slots=True)
class DecodeSlots:
    """The slots of each source; ``position`` is the position of the token in each.

    ``own`` is true at the slots that a row reads; None: every row reads all slots of its source.
    ``newest`` are the positions of the tokens appended last. Row i belongs to source i // k.
    """

    position: Int[Tensor, "B S"]
    own: Bool[Tensor, "R S"] | None = None
    newest: Int[Tensor, "R n"] | None = None
    _allowed: list[Tensor | None] = field(default_factory=list, repr=False)
    _last_own: _OwnSlots | None = None

    @staticmethod
    def empty(sources: int, *, device: torch.device) -> "DecodeSlots":
        """Return no slots, one row for each source."""
        return DecodeSlots(torch.zeros(sources, 0, dtype=torch.long, device=device))

    @property
    def sources(self) -> int:
        return self.position.shape[0]

    @property
    def used(self) -> int:
        """The number of slots of each source."""
        return self.position.shape[1]

    @property
    def newest_positions(self) -> Int[Tensor, "R n"]:
        """The positions of the tokens appended last, in each row."""
        assert self.newest is not None, "no tokens were appended"
        return self.newest

    @property
    def is_first(self) -> bool:
        """Whether the newest tokens are all there are: a row then attends to whole rows only."""
        return self.newest is not None and self.newest.shape == self.position.shape

    def append(self, start: Int[Tensor, "R"], packing: Packing) -> None:
        """Add slots for the tokens of ``packing``, after the ``start`` that each row has."""
        rows, count, sources = packing.rows, packing.length, self.sources
        beams, before = rows // sources, self.used
        self.newest = start[:, None]
        if count > 1:
            self.newest = self.newest + torch.arange(count, device=start.device)
        self.position = torch.cat([self.position, self.newest.reshape(sources, -1)], 1)
        self._allowed.clear()
        if self.own is None and beams == 1 and packing.mask is None:
            return
        earlier = self.own if before else start.new_zeros(rows, 0, dtype=torch.bool)
        if earlier is None:
            earlier = start.new_ones(rows, before, dtype=torch.bool)
        self.own = torch.cat([earlier, self._newest_own(packing)], 1)

    def _newest_own(self, packing: Packing) -> Bool[Tensor, "R kn"]:
        """Return which of the newest slots of its source each row reads: those of its tokens."""
        count, sources, beams = packing.length, self.sources, packing.rows // self.sources
        shape = (sources, beams, count)
        if packing.mask is None and self._last_own and self._last_own.shape == shape:
            return self._last_own.mask
        of_row = torch.arange(beams, device=self.position.device)
        itself = (of_row[:, None] == of_row)[None, :, :, None]  # [1, k, k, n]
        if packing.mask is not None:
            itself = itself & packing.mask.view(sources, beams, 1, count)
        mask = itself.expand(sources, beams, beams, count).reshape(packing.rows, beams * count)
        if packing.mask is None:
            self._last_own = _OwnSlots(shape, mask)
        return mask

    def select(self, rows: Int[Tensor, "R2"], sources: Int[Tensor, "B2"] | None) -> None:
        """Continue the rows ``rows``, equally many of each of ``sources`` (None: of all)."""
        if self.own is not None:
            self.own = self.own.index_select(0, rows)
        if sources is not None:
            self.position = self.position.index_select(0, sources)

    def allowed(self) -> Bool[Tensor, "B 1 kn S"] | None:
        """Return which slots each of the newest tokens attends to; None: all.

        Its own row's, at positions up to its own.
        """
        if not self._allowed:
            self._allowed.append(self._make_allowed())
        return self._allowed[0]

    def _make_allowed(self) -> Bool[Tensor, "B 1 kn S"] | None:
        rows, count = self.newest_positions.shape
        if count == 1:
            return None if self.own is None else self.own.view(self.sources, 1, -1, self.used)
        seen = self.position[:, None] <= self.newest_positions.view(self.sources, -1, 1)
        if self.own is not None:
            own = self.own[:, None].expand(rows, count, self.used)
            seen = seen & own.reshape(self.sources, -1, self.used)
        return seen[:, None]
