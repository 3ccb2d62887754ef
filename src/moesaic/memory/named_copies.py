"""Named copies: tensors that are copied between a device and host memory in an order of their own.

Each copy of a tensor follows the one before of the same name, in either direction.
"""

from collections.abc import Iterable, Sequence

from moesaic.core.shapes import Tensor
from moesaic.memory.device_copies import CopyQueue, DeviceCopies, Event
from moesaic.memory.tensor_store import Access, FetchedTensors, Place


class NamedCopies:
    """Copies of tensors by name (see the module's docstring)."""

    def __init__(self, copies: DeviceCopies) -> None:
        self.copies = copies
        self._last: dict[str, Event] = {}

    def fetch(
        self,
        tensors: Sequence[tuple[str, Tensor]],
        *,
        place: Place,
        access: Access,
        into: Sequence[Tensor] | None = None,
    ) -> FetchedTensors:
        """Bring tensors from the other side to ``place``: copies of them, or ``into`` others."""
        names, views = [name for name, _ in tensors], [view for _, view in tensors]
        copies, streams = self.copies, self.copies.streams
        to_host = place is Place.HOST
        way, back = copies.to_device, copies.to_host
        if to_host:
            way, back = back, way
        make = streams.host_memory if to_host else streams.device_memory
        fetched = list(into) if into is not None else [make(v.shape, v.dtype) for v in views]
        arrived: Event | None = None
        if access is not Access.REPLACE:
            arrived = self._start(way, names, list(zip(fetched, views, strict=True)))

        def wait() -> list[Tensor]:
            if arrived is not None:
                arrived.synchronize() if to_host else copies.wait_on_device(arrived)
            return fetched

        def release() -> None:
            if access is not Access.READ:
                self._start(back, names, list(zip(views, fetched, strict=True)))
            copies.release_done()

        return FetchedTensors(wait, release)

    def write(self, name: str, target: Tensor, source: Tensor) -> None:
        """Copy a tensor of the device, which may change at once, to host memory."""
        self.copies.to_host.make_room(source.nbytes)
        self._start(self.copies.to_host, [name], [(target, source.clone())])

    def synchronize(self, names: Iterable[str] | None = None) -> None:
        """Wait until the host may read and write these tensors; None: all."""
        for name in list(self._last) if names is None else names:
            last = self._last.pop(name, None)
            if last is not None:
                last.synchronize()
        self.copies.release_done()

    def join(self) -> None:
        """Have the device's work wait for what comes, and wait for what leaves it."""
        arriving, leaving = self.copies.to_device.latest, self.copies.to_host.latest
        if arriving is not None:
            self.copies.wait_on_device(arriving)
        if leaving is not None:
            leaving.synchronize()
        self.copies.release_done()

    def _start(
        self, queue: CopyQueue, names: Sequence[str], pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> Event:
        known = [self._last[name] for name in names if name in self._last]
        done = queue.start(pairs, after={id(event): event for event in known}.values())
        self._last.update(dict.fromkeys(names, done))
        return done
