"""Pinned ring: tensors leave a device for a host function through a few buffers, used in turn.

``send`` starts the copies of a tensor in pieces, each into a free buffer, and waits only while none
is free. A thread waits for each copy and gives what has arrived to the function, in the order in
which it was sent; then the buffer is free again.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import torch

from moesaic.core.shapes import Tensor
from moesaic.memory.device_copies import DeviceCopies, Event

BUFFERS = 8
ALIGNMENT = 64  # bytes


class _Piece(NamedTuple):
    """A part of a tensor in a buffer, valid when ``done`` is."""

    buffer: Tensor
    values: Tensor
    done: Event


class PinnedRing:
    """``BUFFERS`` buffers of ``num_bytes`` together (see the module's docstring)."""

    def __init__(self, copies: DeviceCopies, *, num_bytes: int) -> None:
        self._copies = copies
        self._size = max(1, num_bytes // BUFFERS // ALIGNMENT) * ALIGNMENT
        self.num_bytes = BUFFERS * self._size
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for buffer in copies.streams.host_memory((self.num_bytes,), torch.uint8).split(self._size):
            self._free.put(buffer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arrivals")

    def pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors as flat pieces, each of which fits into a buffer."""
        return [p for t in tensors for p in t.reshape(-1).split(self._size // t.itemsize)]

    def send(
        self, tensors: Sequence[Tensor], consume: Callable[[Iterator[Tensor]], None]
    ) -> "Future[None]":
        """Copy tensors to the host; a thread calls ``consume`` with their pieces as they arrive.

        A piece is valid until the next one is taken.
        """
        sent: SimpleQueue[_Piece | None] = SimpleQueue()
        pieces = self.pieces(tensors)
        received = self._thread.submit(self._receive, sent, len(pieces), consume)
        try:
            for piece in pieces:
                buffer = self._free.get()
                values = buffer[: piece.nbytes].view(piece.dtype)
                done = self._copies.to_host.start([(values, piece)])
                sent.put(_Piece(buffer, values, done))
        except BaseException:
            sent.put(None)
            raise
        return received

    def _receive(
        self,
        sent: "SimpleQueue[_Piece | None]",
        count: int,
        consume: Callable[[Iterator[Tensor]], None],
    ) -> None:
        arrived = self._arrived(sent, count)
        try:
            consume(arrived)
        finally:
            for _ in arrived:  # of the last buffer, and those that a failed function has left
                pass
            self._copies.release_done()

    def _arrived(self, sent: "SimpleQueue[_Piece | None]", count: int) -> Iterator[Tensor]:
        for _ in range(count):
            piece = sent.get()
            if piece is None:
                raise RuntimeError("a copy from the device could not be started")
            piece.done.synchronize()
            try:
                yield piece.values
            finally:
                self._free.put(piece.buffer)
