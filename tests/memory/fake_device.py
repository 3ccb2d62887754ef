"""A device whose streams run as late as they may, and which notices copies that are out of order.

Its memory is that of the process. What the computing stream is given runs at once; a copy on
another stream runs when something waits for it, at the latest. Until then its target holds ones in
all bits, and it must find its source as it was, and both in memory.
"""

import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.memory import device_copies
from moesaic.memory.device_copies import DeviceStreams

CPU = torch.device("cpu")


class FakeDevice:
    """Streams of a device, their copies, and what was out of order."""

    def __init__(self, *, seed: int = 0) -> None:
        self.problems: list[str] = []
        self.copies = 0
        self.lock = threading.RLock()
        self.draw = random.Random(seed)
        self.compute = FakeStream(self)
        self.streams = DeviceStreams(
            CPU, lambda: self.compute, FakeStream(self), FakeStream(self), lambda: FakeEvent(self)
        )

    @contextmanager
    def used(self) -> Iterator["FakeDevice"]:
        """Have what is opened meanwhile copy as if the model were on this device."""
        with patch.object(device_copies, "device_streams", lambda _: self.streams):
            yield self


class FakeEvent:
    """Done when its stream has run what it had when it was recorded."""

    def __init__(self, device: FakeDevice) -> None:
        self._device, self.stream, self.position = device, device.compute, 0

    def record(self, stream: "FakeStream") -> None:
        self.stream, self.position = stream, stream.given

    def query(self) -> bool:
        with self._device.lock:
            if self._device.draw.random() < 0.3:
                self.synchronize()
            return self.stream.done >= self.position

    def synchronize(self) -> None:
        with self._device.lock:
            self.stream.run_to(self.position)


class FakeStream:
    """Work in turn: copies, and waits for events."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.given = self.done = 0
        self._work: list[Callable[[], object]] = []
        self._of_thread = _OfThread()  # several give it work at once

    def wait_event(self, event: FakeEvent) -> None:
        with self._device.lock:
            if self is self._device.compute:
                event.synchronize()
            else:
                self._of_thread.follows_compute |= event.stream is self._device.compute
                self.add(event.synchronize)
                if event.stream is not self._device.compute:
                    self.run_to(self.given)  # what follows may write what that copy reads

    def add(self, work: Callable[[], object]) -> None:
        self._work.append(work)
        self.given += 1

    def run_to(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self._work.pop(0)()

    def __enter__(self) -> "FakeStream":
        here = self._of_thread
        if not here.follows_compute:
            self._device.problems.append("a copy that does not follow what the device computes")
        here.follows_compute = False
        here.modes.append(_Deferred(self, self._device))
        here.modes[-1].__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._of_thread.modes.pop().__exit__(*error)


class _OfThread(threading.local):
    """Whether what a thread gives a stream next follows the computing one; its open contexts."""

    def __init__(self) -> None:
        self.follows_compute = False
        self.modes: list[TorchDispatchMode] = []


class _Deferred(TorchDispatchMode):
    def __init__(self, stream: FakeStream, device: FakeDevice) -> None:
        super().__init__()
        self._stream, self._device = stream, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target, source = args[:2]
        if func is not torch.ops.aten.copy_.default:
            raise AssertionError(f"{func} on a stream for copies")
        with self._device.lock:
            self._device.copies += 1
            self._stream.add(self._copy(target, source))
        return target

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        ends, was = (weakref.ref(target), weakref.ref(source)), source.clone()
        _bits(target).fill_(255)

        def run() -> None:
            to, given = (end() for end in ends)
            problems = self._device.problems
            if to is None or given is None or not (_is_there(to) and _is_there(given)):
                problems.append("memory released before its copy was done")
            elif not torch.equal(_bits(given.clone()), _bits(was)):
                problems.append("a source changed before its copy was done")
            elif not bool((_bits(to.clone()) == 255).all()):
                problems.append("a target written before its copy was done")
            else:
                to.copy_(given)

        return run


def _is_there(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() >= tensor.nbytes


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1)
