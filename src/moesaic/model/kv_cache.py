"""KV cache: keys and values of the tokens decoded so far, one row per hypothesis.

Letters: B hypotheses, S source length, n new tokens.
"""

from dataclasses import dataclass

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.packing import Packing


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """The encoder's states of a batch of sources."""

    states: Float[Tensor, "T D"]
    packing: Packing


@dataclass(slots=True)
class KVCache:
    """Keys and values of each decoder block, the length of each row and its first token.

    ``routing`` has the keys and values of routers that attend to earlier tokens.
    ``Transformer.step`` appends to the cache in place; ``reorder`` selects rows (those that a beam
    search continues).
    """

    self_attention: list[KeyValue]
    cross_attention: list[KeyValue | None]
    mask: Bool[Tensor, "B 1 1 S"] | None
    length: Int[Tensor, "B"]
    tag: Int[Tensor, "B"]
    routing: KeyValue | None = None

    @property
    def rows(self) -> int:
        return self.length.numel()

    def reserve(self, length: int) -> None:
        """Grow to at least ``length`` tokens per row."""
        self.self_attention = [layer.grow(length) for layer in self.self_attention]
        self.routing = self.routing.grow(length) if self.routing else None

    def reorder(self, rows: Int[Tensor, "R"], _sources: Int[Tensor, "K"] | None = None) -> None:
        """Select the rows ``rows``, in that order; a row may occur twice or not at all."""
        self.self_attention = [layer.select(rows) for layer in self.self_attention]
        self.routing = self.routing.select(rows) if self.routing else None
        self.length = self.length.index_select(0, rows)
        self.tag = self.tag.index_select(0, rows)
        self.cross_attention = [
            layer.select(rows) if layer else None for layer in self.cross_attention
        ]
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)
