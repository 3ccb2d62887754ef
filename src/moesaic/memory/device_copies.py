"""Device copies: between a device and host memory, on streams beside the device's other work.

A copy begins when what its thread had given to the device before is done, and after the copies that
it is told to follow; its event says when it is done. A queue keeps the tensors of copies under way,
at most so many bytes: to make room, the stream they came from waits for the oldest copy, and then
they are released. So no host thread waits, and memory is not used again before its copy is done.

One stream for each direction is shared by all purposes of a device, each of which has its own
bound. A CPU has no streams: there nothing is copied, or at once.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from moesaic.core.shapes import Tensor

Event = Any  # torch.Event; tests have one of their own


class DeviceStreams(NamedTuple):
    """The streams of a device's copies. ``current`` returns the present one of a thread."""

    device: torch.device
    current: Callable[[], Any]
    to_host: Any
    to_device: Any
    new_event: Callable[[], Event]

    def record(self, stream: Any) -> Event:
        """Return an event that is done when all that the stream has been given is."""
        event = self.new_event()
        event.record(stream)
        return event

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory that copies from and to the device read and write beside the host."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type != "cpu")

    def device_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the device."""
        return torch.empty(shape, dtype=dtype, device=self.device)


@lru_cache
def device_streams(device: torch.device) -> DeviceStreams | None:
    """Return the streams of a device's copies; None for a CPU, which has none."""
    if device.type in ("cpu", "meta"):
        return None
    return DeviceStreams(
        device,
        partial(torch.accelerator.current_stream, device),
        torch.Stream(device),
        torch.Stream(device),
        partial(torch.Event, device),
    )


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy under way. ``origin`` is the stream whose memory the tensors of the device are."""

    done: Event
    origin: Any
    bytes: int
    tensors: Sequence[tuple[Tensor, Tensor]]


class CopyQueue:
    """Copies in one direction, in turn. ``max_bytes`` bounds those that are under way.

    One that is larger is alone under way. ``bytes`` is what is under way, ``peak_bytes`` the most
    there was, ``latest`` the event of the last copy.
    """

    def __init__(self, stream: Any, *, streams: DeviceStreams, max_bytes: int) -> None:
        self._stream, self._streams, self.max_bytes = stream, streams, max_bytes
        self.bytes, self.peak_bytes = 0, 0
        self.latest: Event | None = None
        self._under_way: deque[_Copy] = deque()
        self._lock = threading.Lock()

    def start(
        self, pairs: Sequence[tuple[Tensor, Tensor]], *, after: Iterable[Event] = ()
    ) -> Event:
        """Copy the second tensor of each pair to the first, after some events. Returns its event.

        Until it is done, neither may be changed but by work of the device that waits for it.
        """
        size = sum(source.nbytes for _, source in pairs)
        with self._lock:
            self._make_room(size)
            origin = self._streams.current()
            self._stream.wait_event(self._streams.record(origin))
            for event in after:
                self._stream.wait_event(event)
            with self._stream, torch.no_grad():
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
            done = self.latest = self._streams.record(self._stream)
            self._under_way.append(_Copy(done, origin, size, pairs))
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return done

    def make_room(self, size: int) -> None:
        """Release the tensors of copies that are done, and others until so many bytes fit in."""
        with self._lock:
            self._make_room(size)

    def _make_room(self, size: int) -> None:
        while self._under_way:
            oldest = self._under_way[0]
            if self.bytes + size <= self.max_bytes and not oldest.done.query():
                return
            oldest.origin.wait_event(oldest.done)
            self._under_way.popleft()
            self.bytes -= oldest.bytes


class DeviceCopies:
    """The copies of one purpose in both directions. ``max_bytes`` bounds each."""

    def __init__(self, streams: DeviceStreams, *, max_bytes: int) -> None:
        self.streams = streams
        self.to_host = CopyQueue(streams.to_host, streams=streams, max_bytes=max_bytes)
        self.to_device = CopyQueue(streams.to_device, streams=streams, max_bytes=max_bytes)

    def release_done(self) -> None:
        """Release the tensors of copies that are done."""
        self.to_host.make_room(0)
        self.to_device.make_room(0)

    def wait_on_device(self, event: Event) -> None:
        """Have what this thread gives to the device from now on wait for a copy."""
        self.streams.current().wait_event(event)


def device_copies(device: torch.device, *, max_bytes: int) -> DeviceCopies | None:
    """Return the copies of a purpose; None where the device computes in host memory."""
    streams = device_streams(device)
    return None if streams is None else DeviceCopies(streams, max_bytes=max_bytes)
