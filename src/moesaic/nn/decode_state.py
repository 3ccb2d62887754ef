"""Decode states: what a sequence mixer keeps of the tokens decoded so far, one row per hypothesis.

Letters: R rows, B sources, K of which are kept, G key/value heads, C slots, m new ones, d head dim
(e of values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.attention_backend import KeyValue

MIN_ROOM = 64  # slots, so that a short answer grows once


@runtime_checkable
class DecodeState(Protocol):
    """What a mixer keeps between decoding steps; the mixer that made it changes it in place."""

    def select(self, rows: Int[Tensor, "R"], sources: Int[Tensor, "K"] | None) -> Self:
        """Return a state of the rows ``rows``, in that order; a row may occur twice.

        They continue the ``sources``, equally many of each, one after the other; None: all sources.
        """
        ...

    @property
    def nbytes(self) -> int:
        """The bytes that the state holds now."""
        ...


@dataclass(slots=True)
class KVState:
    """Keys and values of all tokens so far, in the slots of their source: the state of attention.

    ``DecodeSlots`` says which slots a row reads, so rows that continue others copy nothing. There
    is room for more than ``used`` slots.
    """

    key: Float[Tensor, "B G C d"]
    value: Float[Tensor, "B G C e"]
    used: int = 0

    @staticmethod
    def empty(rows: int, *, kv_heads: int, head_dim: int, like: Tensor) -> "KVState":
        """Return a state without tokens, of the dtype and device of ``like``."""
        none = like.new_zeros(rows, kv_heads, 0, head_dim)
        return KVState(none, none)

    def select(self, rows: Int[Tensor, "R"], sources: Int[Tensor, "K"] | None) -> "KVState":
        del rows
        if sources is None:
            return self
        used = self.used
        key, value = self.key[:, :, :used], self.value[:, :, :used]
        return KVState(key.index_select(0, sources), value.index_select(0, sources), used)

    def append(self, key: Float[Tensor, "B G m d"], value: Float[Tensor, "B G m e"]) -> KeyValue:
        """Store the newest keys and values, and return all so far."""
        end = self.used + key.shape[2]
        if end > self.key.shape[2]:
            room = max(MIN_ROOM, 2 * end)
            self.key, self.value = (
                self._with_room(self.key, room),
                self._with_room(self.value, room),
            )
        self.key[:, :, self.used : end] = key
        self.value[:, :, self.used : end] = value
        self.used = end
        return KeyValue(self.key[:, :, :end], self.value[:, :, :end])

    def _with_room(self, held: Float[Tensor, "B G C d"], room: int) -> Float[Tensor, "B G C d"]:
        larger = held.new_empty(*held.shape[:2], room, held.shape[3])
        larger[:, :, : self.used] = held[:, :, : self.used]
        return larger

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """Keys and values that the newest tokens may attend to, and their positions in the row.

    A negative position is a place without a token.
    """

    keys: KeyValue
    position: Int[Tensor, "R S"]


@dataclass(slots=True)
class WindowKVState:
    """Keys and values of the ``size`` newest tokens: a ring buffer, constant once it is full.

    Each row has its own, and the token at its position p is at place ``p % size``. ``used`` bounds
    the length of the rows.
    """

    key: Float[Tensor, "R G C d"]
    value: Float[Tensor, "R G C e"]
    size: int
    used: int = 0

    def select(self, rows: Int[Tensor, "R"], sources: Int[Tensor, "K"] | None) -> "WindowKVState":
        del sources
        key, value = self.key.index_select(0, rows), self.value.index_select(0, rows)
        return WindowKVState(key, value, self.size, self.used)

    def append(
        self, new: KeyValue, *, position: Int[Tensor, "R n"], count: Int[Tensor, "R"] | None
    ) -> CachedKeys:
        """Store new keys and values at these positions; those that leave are in this result only.

        ``count`` are the numbers of new tokens in each row, where padding follows them.
        """
        self._grow(position.shape[1])
        start = position[:, 0]
        if count is None and position.shape[1] == 1:  # what it replaces is out of the window
            row = torch.arange(len(start), device=start.device)
            self.key[row, :, start % self.size] = new.key[:, :, 0]
            self.value[row, :, start % self.size] = new.value[:, :, 0]
            return CachedKeys(KeyValue(self.key, self.value), self._positions(start + 1))
        old, places = self._positions(start), self.key.shape[2]
        both = KeyValue(torch.cat([self.key, new.key], 2), torch.cat([self.value, new.value], 2))
        after = self._positions(start + (position.shape[1] if count is None else count))
        place = torch.arange(places, device=start.device)
        index = torch.where(after < start[:, None], place, places + after - start[:, None])
        index = index[:, None, :, None]
        self.key, self.value = (torch.take_along_dim(x, index, 2) for x in (both.key, both.value))
        return CachedKeys(both, torch.cat([old, position], 1))

    def _grow(self, count: int) -> None:
        self.used += count
        room = min(self.size, max(MIN_ROOM, 2 * self.used))
        if min(self.used, self.size) > self.key.shape[2]:
            extra = (0, 0, 0, room - self.key.shape[2])
            self.key, self.value = F.pad(self.key, extra), F.pad(self.value, extra)

    def _positions(self, length: Int[Tensor, "R"]) -> Int[Tensor, "R C"]:
        """Return the position of the token at each place, in rows of ``length`` tokens."""
        place = torch.arange(self.key.shape[2], device=length.device)
        last = length[:, None] - 1
        return last - (last - place) % self.size

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


@dataclass(slots=True)
class TensorState:
    """Tensors of constant size, rows first: the state of a recurrence or of a short convolution.

    ``tensors`` may be replaced or written in place by the mixer.
    """

    tensors: tuple[Tensor, ...]

    def select(self, rows: Int[Tensor, "R"], sources: Int[Tensor, "K"] | None) -> "TensorState":
        del sources
        return TensorState(tuple(tensor.index_select(0, rows) for tensor in self.tensors))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(slots=True)
class JointState:
    """The states of several mixers that read the same tokens."""

    states: Sequence[DecodeState]

    def select(self, rows: Int[Tensor, "R"], sources: Int[Tensor, "K"] | None) -> "JointState":
        return JointState([state.select(rows, sources) for state in self.states])

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)
