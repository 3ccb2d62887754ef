"""Decoding cache: the decode states of all mixers (KV caches), one row per hypothesis.

Letters: B sources, R hypotheses, S source length, T tokens, D model dim.
"""

from dataclasses import dataclass

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.decode_slots import DecodeSlots
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

    Rows are hypotheses: equally many for each source, those of a source one after the other.
    ``mixers`` has one state for each residual branch of a block that mixes tokens; ``routing`` is
    that of routers that read earlier tokens; ``cross_attention`` and ``mask`` have a row for each
    source, which all its hypotheses read. ``Transformer.step`` appends to the cache in place;
    ``reorder`` selects rows (those that a beam search continues).
    """

    mixers: list[list[DecodeState]]
    cross_attention: list[KeyValue | None]
    mask: Bool[Tensor, "B 1 1 S"] | None
    slots: DecodeSlots
    length: Int[Tensor, "R"]
    tag: Int[Tensor, "R"]
    routing: DecodeState | None = None
    _single: Packing | None = None

    @property
    def rows(self) -> int:
        return self.length.numel()

    @property
    def single(self) -> Packing:
        """The packing of one newest token in each row, made once for a number of rows."""
        if self._single is None or self._single.rows != self.rows:
            self._single = Packing.single(self.rows, device=self.length.device)
        return self._single

    def reorder(self, rows: Int[Tensor, "R2"], sources: Int[Tensor, "B2"] | None = None) -> None:
        """Select the rows ``rows``, in that order; a row may occur twice or not at all.

        They continue the ``sources``, equally many of each, one after the other; None: all sources.
        """
        self.slots.select(rows, sources)
        self.mixers = [[state.select(rows, sources) for state in block] for block in self.mixers]
        self.routing = self.routing.select(rows, sources) if self.routing else None
        self.length = self.length.index_select(0, rows)
        self.tag = self.tag.index_select(0, rows)
        if sources is None:
            return
        self.cross_attention = [layer and layer.select(sources) for layer in self.cross_attention]
        if self.mask is not None:
            self.mask = self.mask.index_select(0, sources)

    @property
    def nbytes(self) -> int:
        """The bytes of the states of all mixers now, cross-attention aside."""
        states = [state for block in self.mixers for state in block]
        return sum(state.nbytes for state in [*states, *filter(None, [self.routing])])
