"""Decode states: what a sequence mixer keeps of the tokens decoded so far, one row per hypothesis.

Letters: R rows, B hypotheses, G key/value heads, n newest tokens, d head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch

from moesaic.core.shapes import Int, Tensor
from moesaic.nn.attention_backend import KeyValue


@runtime_checkable
class DecodeState(Protocol):
    """What a mixer keeps between decoding steps; the mixer that made it changes it in place."""

    def select(self, rows: Int[Tensor, "R"]) -> Self:
        """Return a state of the rows ``rows``, in that order; a row may occur twice."""
        ...

    def reserve(self, length: int) -> None:
        """Grow to room for ``length`` tokens per row; a state of constant size does nothing."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes that the state holds now."""
        ...


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """Keys and values that the newest tokens may attend to, and their positions in the row.

    A negative position is a place without a token.
    """

    keys: KeyValue
    position: Int[Tensor, "#B S"]


@runtime_checkable
class KeyValueState(DecodeState, Protocol):
    """The decode state of an attention."""

    def append(
        self, new: KeyValue, *, start: Int[Tensor, "B"], count: Int[Tensor, "B"] | None
    ) -> CachedKeys:
        """Store the newest tokens of each row, after the ``start`` that it has.

        ``count`` are the numbers of new tokens in each row, where padding follows them. Returns what
        the new tokens may attend to, themselves included. ``reserve`` made room for them.
        """
        ...


@dataclass(slots=True)
class KVState:
    """Keys and values of all tokens so far."""

    keys: KeyValue

    @staticmethod
    def empty(rows: int, *, kv_heads: int, head_dim: int, like: Tensor) -> "KVState":
        """Return a state without tokens, of the dtype and device of ``like``."""
        none = like.new_zeros(rows, kv_heads, 0, head_dim)
        return KVState(KeyValue(none, none))

    def select(self, rows: Int[Tensor, "R"]) -> "KVState":
        return KVState(self.keys.select(rows))

    def reserve(self, length: int) -> None:
        self.keys = self.keys.grow(length)

    def append(
        self, new: KeyValue, *, start: Int[Tensor, "B"], count: Int[Tensor, "B"] | None
    ) -> CachedKeys:
        """Store new keys and values; padding is stored too, and later tokens are written over it."""
        del count
        self.keys.write(new, position=newest_positions(start, new.key.shape[2]))
        return CachedKeys(
            self.keys, torch.arange(self.keys.key.shape[2], device=start.device)[None]
        )

    @property
    def nbytes(self) -> int:
        return self.keys.key.nbytes + self.keys.value.nbytes


@dataclass(slots=True)
class WindowKVState:
    """Keys and values of the ``size`` newest tokens: a ring buffer, constant once it is full.

    The token at position p of a row is at place ``p % size``.
    """

    keys: KeyValue
    size: int

    def select(self, rows: Int[Tensor, "R"]) -> "WindowKVState":
        return WindowKVState(self.keys.select(rows), self.size)

    def reserve(self, length: int) -> None:
        grown = self.keys.grow(min(length, self.size))
        self.keys = KeyValue(grown.key[:, :, : self.size], grown.value[:, :, : self.size])

    def append(
        self, new: KeyValue, *, start: Int[Tensor, "B"], count: Int[Tensor, "B"] | None
    ) -> CachedKeys:
        """Store new keys and values; those that leave the window are seen by this call only."""
        newest = newest_positions(start, new.key.shape[2])
        if count is None and newest.shape[1] == 1:  # what it replaces is out of the window
            self.keys.write(new, position=newest % self.size)
            return CachedKeys(self.keys, self._positions(start + 1))
        old = self._positions(start)
        both = KeyValue(
            torch.cat([self.keys.key, new.key], 2), torch.cat([self.keys.value, new.value], 2)
        )
        after = self._positions(start + (newest.shape[1] if count is None else count))
        place = torch.arange(old.shape[1], device=old.device)
        index = torch.where(after < start[:, None], place, old.shape[1] + after - start[:, None])
        self.keys = both.gather(index)
        return CachedKeys(both, torch.cat([old, newest], 1))

    def _positions(self, length: Int[Tensor, "B"]) -> Int[Tensor, "B S"]:
        """Return the position of the token at each place, in rows of ``length`` tokens."""
        place = torch.arange(self.keys.key.shape[2], device=length.device)
        last = length[:, None] - 1
        return last - (last - place) % self.size

    @property
    def nbytes(self) -> int:
        return self.keys.key.nbytes + self.keys.value.nbytes


@dataclass(slots=True)
class TensorState:
    """Tensors of constant size, rows first: the state of a recurrence or of a short convolution.

    ``tensors`` may be replaced or written in place by the mixer.
    """

    tensors: tuple[Tensor, ...]

    def select(self, rows: Int[Tensor, "R"]) -> "TensorState":
        return TensorState(tuple(tensor.index_select(0, rows) for tensor in self.tensors))

    def reserve(self, length: int) -> None:
        """Do nothing: the size is independent of the length."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(slots=True)
class JointState:
    """The states of several mixers that read the same tokens."""

    states: Sequence[DecodeState]

    def select(self, rows: Int[Tensor, "R"]) -> "JointState":
        return JointState([state.select(rows) for state in self.states])

    def reserve(self, length: int) -> None:
        for state in self.states:
            state.reserve(length)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)


def newest_positions(start: Int[Tensor, "B"], count: int) -> Int[Tensor, "B n"]:
    """Return the positions of ``count`` tokens after the ``start`` that each row has."""
    return start[:, None] + torch.arange(count, device=start.device)
