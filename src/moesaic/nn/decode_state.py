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


@dataclass(slots=True)
class KVState:
    """Keys and values of all tokens so far: the state of attention."""

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

    def write(self, new: KeyValue, *, position: Int[Tensor, "B n"]) -> None:
        """Store the keys and values of the newest tokens; ``reserve`` made room for them."""
        self.keys.write(new, position=position)

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
