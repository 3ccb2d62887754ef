"""Block: attention and a feed-forward (dense or sparse), each added to the stream it read.

Letters: B rows, L length, T tokens, D model dim.
"""

from dataclasses import dataclass, replace

from torch import nn

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.model.blueprint import Blueprint, Stack
from moesaic.moe.context import Carry, Context
from moesaic.moe.gates import Place
from moesaic.moe.layer import MoELayer
from moesaic.moe.record import Record
from moesaic.nn.attention import CrossAttention, KeyValue, SelfAttention
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.packing import Packing
from moesaic.nn.position import Rotation

Records = tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class View:
    """How the tokens of one pass see each other: where they are and how positions turn them.

    ``context`` is what routers may know of them.
    """

    packing: Packing
    rotation: Rotation
    context: Context


@dataclass(frozen=True, slots=True)
class Stream:
    """The states between two blocks, and what the MoE layers of the stack hand on."""

    x: Float[Tensor, "T D"]
    carry: Carry
    records: Records = ()


class SelfBranch(nn.Module):
    """``x + attention(norm(x))``."""

    def __init__(self, config: Blueprint, *, causal: bool) -> None:
        super().__init__()
        self.norm = config.norm.build(config.dim)
        self.inner = SelfAttention(config.attention, dim=config.dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.causal = causal

    def forward(self, x: Float[Tensor, "T D"], *, view: View) -> Float[Tensor, "T D"]:
        y = self.inner(
            self.norm(x), packing=view.packing, rotation=view.rotation, causal=self.causal
        )
        return x + self.dropout(y)

    def step(
        self, x: Float[Tensor, "T D"], *, view: View, cache: KeyValue, position: Int[Tensor, "B n"]
    ) -> Float[Tensor, "T D"]:
        """The same for the newest tokens only."""
        return x + self.inner.step(
            self.norm(x),
            packing=view.packing,
            rotation=view.rotation,
            cache=cache,
            position=position,
        )


class CrossBranch(nn.Module):
    """``x + attention(norm(x), source)``."""

    def __init__(self, config: Blueprint) -> None:
        super().__init__()
        self.norm = config.norm.build(config.dim)
        self.inner = CrossAttention(config.attention, dim=config.dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        view: View,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        y = self.inner(self.norm(x), packing=view.packing, source=source, mask=mask)
        return x + self.dropout(y)


class DenseBranch(nn.Module):
    """``x + feed_forward(norm(x))``; nothing is recorded or handed on."""

    def __init__(self, config: Blueprint) -> None:
        super().__init__()
        self.norm = config.norm.build(config.dim)
        self.inner = DenseFeedForward(config.feed_forward, dim=config.dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, stream: Stream, *, context: Context) -> Stream:
        del context
        x = stream.x + self.dropout(self.inner(self.norm(stream.x)))
        return replace(stream, x=x)


class SparseBranch(nn.Module):
    """``x + experts(norm(x))``, and a record if there is a router."""

    def __init__(self, config: Blueprint, *, moe: MoELayer) -> None:
        super().__init__()
        self.norm = config.norm.build(config.dim)
        self.inner = moe
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, stream: Stream, *, context: Context) -> Stream:
        answer = self.inner(self.norm(stream.x), context=context, carry=stream.carry)
        records = stream.records if answer.record is None else (*stream.records, answer.record)
        return Stream(stream.x + self.dropout(answer.out), answer.carry, records)


class EncoderBlock(nn.Module):
    """Self-attention, feed-forward."""

    def __init__(self, config: Blueprint, *, layer: int) -> None:
        super().__init__()
        self.self_attention = SelfBranch(config, causal=False)
        self.feed_forward = feed_forward(config, stack=config.encoder, layer=layer, side="encoder")

    def forward(self, stream: Stream, *, view: View) -> Stream:
        x = self.self_attention(stream.x, view=view)
        return self.feed_forward(replace(stream, x=x), context=view.context)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention if there is an encoder, feed-forward."""

    def __init__(self, config: Blueprint, *, layer: int) -> None:
        super().__init__()
        self.self_attention = SelfBranch(config, causal=True)
        self.cross_attention = CrossBranch(config) if config.encoder.layers else None
        self.feed_forward = feed_forward(config, stack=config.decoder, layer=layer, side="decoder")

    def read(self, memory: Float[Tensor, "T D"], *, packing: Packing) -> KeyValue | None:
        """Keys and values of the source, if this block looks at one."""
        if self.cross_attention is None:
            return None
        return self.cross_attention.inner.read(memory, packing=packing)

    def forward(
        self,
        stream: Stream,
        *,
        view: View,
        source: KeyValue | None,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Stream:
        x = self.self_attention(stream.x, view=view)
        return self._rest(replace(stream, x=x), view=view, source=source, mask=mask)

    def step(
        self,
        stream: Stream,
        *,
        view: View,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
        source: KeyValue | None,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Stream:
        """The same for the newest tokens, with what came before in ``cache``."""
        x = self.self_attention.step(stream.x, view=view, cache=cache, position=position)
        return self._rest(replace(stream, x=x), view=view, source=source, mask=mask)

    def _rest(
        self, stream: Stream, *, view: View, source: KeyValue | None, mask: Tensor | None
    ) -> Stream:
        if self.cross_attention is not None and source is not None:
            x = self.cross_attention(stream.x, view=view, source=source, mask=mask)
            stream = replace(stream, x=x)
        return self.feed_forward(stream, context=view.context)


def feed_forward(
    config: Blueprint, *, stack: Stack, layer: int, side: str
) -> DenseBranch | SparseBranch:
    """Make a block's last branch: dense, or sparse where the stack says so."""
    moe = config.experts(stack, layer=layer)
    if moe is None:
        return DenseBranch(config)
    sparse = stack.sparse_layers
    place = Place(f"{side}.{layer}", index=sparse.index(layer), count=len(sparse))
    experts = MoELayer(
        moe, dim=config.dim, feed_forward=config.feed_forward, bias=config.bias, place=place
    )
    return SparseBranch(config, moe=experts)
