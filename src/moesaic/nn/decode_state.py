"""Decode states: what a sequence mixer keeps of the tokens decoded so far, one row per hypothesis.

Letters: R rows, B sources, K of which are kept, G key/value heads, C slots, m new ones, d head dim
(e of values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

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
