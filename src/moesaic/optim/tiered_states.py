"""Optimizer states on a memory tier, and the parts of parameters that an update fetches at a time.

A state tensor is stored as ``slot/parameter``; scalars (step counts) stay in the optimizer. Rules
whose updates are elementwise run on the host, where states of the host tier are used in place, in
parts of at most half the bound of bytes in flight: one part is computed with while the one before
it is written. Other rules (Muon) compute on the device, a group at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.tensor_store import (
    Access,
    FetchedTensors,
    Part,
    Place,
    TensorStore,
    TransferCounter,
    rows_of,
)


@dataclass(frozen=True, slots=True)
class ParameterRows:
    """Rows of a parameter's local shard, which are updated together."""

    part: Part
    parameter: Tensor

    @property
    def is_last(self) -> bool:
        return self.part.stop is None or self.part.stop == local_tensor(self.parameter).shape[0]


@dataclass(slots=True)
class UpdatedWeights:
    """Counts the bytes of weights that cross between tiers to be updated.

    ``moved`` are those of the device; ``moved_at_rest`` those of parameters in ``tier``, which are
    updated in its memory: where that is a file, the system reads and writes it.
    """

    tier: TensorStore | None = None
    moved: TransferCounter = field(default_factory=TransferCounter)
    moved_at_rest: TransferCounter = field(default_factory=TransferCounter)

    def count(self, rows: ParameterRows, *, place: Place, reads: bool) -> None:
        """Count an update at ``place``; one of a float32 copy does not read the weights."""
        local = rows_of(local_tensor(rows.parameter), rows.part)
        at_rest = self.tier is not None and rows.part.name in self.tier.specs
        crosses = self.tier.moves_to(place) if self.tier and at_rest else place is Place.HOST
        counter = self.moved_at_rest if at_rest else self.moved
        counter.fetched += local.numel() * local.itemsize * crosses * reads
        counter.written += local.numel() * local.itemsize * crosses


@dataclass(slots=True)
class TieredStates:
    """States of an optimizer in a store."""

    store: TensorStore
    in_flight_bytes: int
    _slots: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def allocate(self, name: str, expected: Mapping[str, Tensor]) -> None:
        """Add the states of a parameter, zeros, if there are none yet."""
        if name not in self._slots:
            self._slots[name] = tuple(slot for slot, like in expected.items() if like.dim())
            for slot in self._slots[name]:
                like = expected[slot]
                self.store.allocate(f"{slot}/{name}", like.shape, like.dtype)

    def parts(self, rows: ParameterRows) -> dict[str, Part]:
        """Return the stored parts of the states of some rows, by slot."""
        name, start, stop = rows.part.name, rows.part.start, rows.part.stop
        return {slot: Part(f"{slot}/{name}", start, stop) for slot in self._slots[name]}

    def live(self, name: str) -> dict[str, Tensor]:
        """Return views of a parameter's stored states, by slot."""
        return {slot: self.store.live(f"{slot}/{name}") for slot in self._slots.get(name, ())}

    def clear(self) -> None:
        """Discard all states."""
        self.store.close()
        self._slots.clear()

    def reserve(self, members: Sequence[ParameterRows]) -> None:
        """Take the room for an update, or raise DiskFullError before anything has changed."""
        self.store.reserve([part for rows in members for part in self.parts(rows).values()])

    def fetch(
        self, members: Sequence[ParameterRows], *, place: Place, access: Access
    ) -> tuple[list[dict[str, Tensor]], FetchedTensors]:
        """Bring the states of these rows to ``place``: by slot, and to release."""
        named = [self.parts(rows) for rows in members]
        flat = [part for parts in named for part in parts.values()]
        fetched = self.store.fetch(flat, access=access, place=place)
        tensors = iter(fetched.wait())
        return [{slot: next(tensors) for slot in parts} for parts in named], fetched

    def num_bytes(self, rows: ParameterRows) -> int:
        """Return the bytes of the states of some rows."""
        parts = self.parts(rows).values()
        return sum(self.store.specs[part.name].of(part).num_bytes for part in parts)

    def split(self, rows: ParameterRows) -> Iterator[ParameterRows]:
        """Yield parts of a parameter whose states fit into half of the bytes in flight."""
        local, size = local_tensor(rows.parameter), self.num_bytes(rows)
        if rows.part.stop is not None or local.dim() == 0 or 2 * size <= self.in_flight_bytes:
            yield rows
            return
        step = max(1, self.in_flight_bytes * local.shape[0] // (2 * size))
        for start in range(0, local.shape[0], step):
            stop = min(start + step, local.shape[0])
            yield ParameterRows(Part(rows.part.name, start, stop), rows.parameter)
