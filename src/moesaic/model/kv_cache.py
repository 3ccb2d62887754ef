"""Decoding cache: the decode states of all mixers (KV caches), one row per hypothesis.

Letters: B hypotheses, S source length, n new tokens.
"""

from dataclasses import dataclass

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.packing import Packing


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """The encoder's states of a batch of sources."""

    states: Float[Tensor, "T D"]
    packing: Packing


@dataclass(slots=True)
class KVCache:
    """The decode states of each decoder block, the length of each row and its first token.

    ``mixers`` has one state for each residual branch of a block that mixes tokens; ``routing`` is
    that of routers that read earlier tokens.
    ``Transformer.step`` appends to the cache in place; ``reorder`` selects rows (those that a beam
    search continues).
    """

    mixers: list[list[DecodeState]]
    cross_attention: list[KeyValue | None]
    mask: Bool[Tensor, "B 1 1 S"] | None
    length: Int[Tensor, "B"]
    tag: Int[Tensor, "B"]
    routing: DecodeState | None = None

    @property
    def rows(self) -> int:
        return self.length.numel()

    def reserve(self, length: int) -> None:
        """Grow to at least ``length`` tokens per row."""
        for state in self._states():
            state.reserve(length)

    def reorder(self, rows: Int[Tensor, "R"], _sources: Int[Tensor, "K"] | None = None) -> None:
        """Select the rows ``rows``, in that order; a row may occur twice or not at all."""
        self.mixers = [[state.select(rows) for state in block] for block in self.mixers]
        self.routing = self.routing.select(rows) if self.routing else None
        self.length = self.length.index_select(0, rows)
        self.tag = self.tag.index_select(0, rows)
        self.cross_attention = [
            layer.select(rows) if layer else None for layer in self.cross_attention
        ]
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)

    @property
    def nbytes(self) -> int:
        """The bytes of the states of all mixers now, cross-attention aside."""
        return sum(state.nbytes for state in self._states())

    def _states(self) -> list[DecodeState]:
        states = [state for block in self.mixers for state in block]
        return [*states, self.routing] if self.routing else states
