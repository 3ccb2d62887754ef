"""Block: attention and a feed-forward (dense or sparse), each adding to the stream.

What a branch reads of the stream is the arrangement's affair (``arrangement.py``).

Letters: B rows, L length, T tokens, D model dim.
"""

from dataclasses import dataclass, replace

from torch import nn

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.model.blueprint import Blueprint, Stack
from moesaic.model.cache import Memory
from moesaic.model.dropout import Dropout
from moesaic.moe.attention import Attends
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.context import Carry, Context
from moesaic.moe.gates import Place
from moesaic.moe.layer import MoELayer
from moesaic.moe.record import Record
from moesaic.nn.attention import CrossAttention
from moesaic.nn.crew import Crew, Solo
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.looking import KeyValue
from moesaic.nn.packing import Packing
from moesaic.nn.position import Rotation

Records = tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class View:
    """How the tokens of one pass see each other: where they are and how positions turn them.

    ``rotation`` is that of the tokens that meet in a matrix (``packing.met``); ``context`` is what
    routers may know of the tokens held here.
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


@dataclass(frozen=True, slots=True)
class Look:
    """What a decoder block's later branches need: how it was entered, and the source."""

    entered: Float[Tensor, "T D"]
    source: KeyValue | None
    mask: Bool[Tensor, "B 1 1 S"] | None


class SelfBranch(nn.Module):
    """``x + attention(norm(read))``."""

    def __init__(self, config: Blueprint, *, causal: bool, name: str) -> None:
        super().__init__()
        self.norm = config.block.branch_norm(config.norm, dim=config.dim)
        self.inner: Attends = config.attention_experts.build(
            config.attention, dim=config.dim, bias=config.bias
        )
        self.dropout = Dropout(config.dropout, name=name)
        self.causal = causal

    def forward(
        self, x: Float[Tensor, "T D"], *, read: Float[Tensor, "T D"], view: View
    ) -> Float[Tensor, "T D"]:
        y = self.inner(
            self.norm(read), packing=view.packing, rotation=view.rotation, causal=self.causal
        )
        return x + self.dropout(y, context=view.context)

    def step(
        self,
        x: Float[Tensor, "T D"],
        *,
        read: Float[Tensor, "T D"],
        view: View,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T D"]:
        """The same for the newest tokens only."""
        return x + self.inner.step(
            self.norm(read),
            packing=view.packing,
            rotation=view.rotation,
            cache=cache,
            position=position,
        )


class CrossBranch(nn.Module):
    """``x + attention(norm(read), source)``."""

    def __init__(self, config: Blueprint, *, name: str) -> None:
        super().__init__()
        self.norm = config.block.branch_norm(config.norm, dim=config.dim)
        self.inner = CrossAttention(config.attention, dim=config.dim, bias=config.bias)
        self.dropout = Dropout(config.dropout, name=name)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        read: Float[Tensor, "T D"],
        view: View,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        y = self.inner(self.norm(read), packing=view.packing, source=source, mask=mask)
        return x + self.dropout(y, context=view.context)


class DenseBranch(nn.Module):
    """``x + feed_forward(norm(read))``; nothing is recorded or handed on."""

    def __init__(self, config: Blueprint, *, name: str) -> None:
        super().__init__()
        self.norm = config.block.branch_norm(config.norm, dim=config.dim)
        self.inner = DenseFeedForward(config.feed_forward, dim=config.dim, bias=config.bias)
        self.dropout = Dropout(config.dropout, name=name)
        self.crew: Crew = Solo()

    def forward(self, stream: Stream, *, read: Float[Tensor, "T D"], view: View) -> Stream:
        met = self.crew.meet(self.norm(read), packing=view.packing)
        y = self.crew.part(self.inner(met), packing=view.packing)
        return replace(stream, x=stream.x + self.dropout(y, context=view.context))


class SparseBranch(nn.Module):
    """``x + experts(norm(read))``, and a record if there is a router."""

    def __init__(self, config: Blueprint, *, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.norm = config.block.branch_norm(config.norm, dim=config.dim)
        self.inner = inner
        self.dropout = Dropout(config.dropout, name=name)

    def forward(self, stream: Stream, *, read: Float[Tensor, "T D"], view: View) -> Stream:
        answer = self.inner(self.norm(read), context=view.context, carry=stream.carry)
        records = stream.records if answer.record is None else (*stream.records, answer.record)
        x = stream.x + self.dropout(answer.out, context=view.context)
        return Stream(x, answer.carry, records)


class EncoderBlock(nn.Module):
    """Self-attention, feed-forward."""

    def __init__(self, config: Blueprint, *, layer: int) -> None:
        super().__init__()
        self.entry = config.block.entry(config.norm, dim=config.dim)
        name = f"encoder.{layer} attention"
        self.self_attention = SelfBranch(config, causal=False, name=name)
        self.feed_forward = feed_forward(config, stack=config.encoder, layer=layer, side="encoder")
        self.arrangement = config.block

    def forward(self, stream: Stream, *, view: View) -> Stream:
        entered, reads = self.entry(stream.x), self.arrangement.reads
        x = self.self_attention(stream.x, read=reads(stream.x, entered=entered), view=view)
        read = reads(x, entered=entered)
        return self.feed_forward(replace(stream, x=x), read=read, view=view)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention if there is an encoder, feed-forward."""

    def __init__(self, config: Blueprint, *, layer: int) -> None:
        super().__init__()
        self.entry = config.block.entry(config.norm, dim=config.dim)
        name = f"decoder.{layer} attention"
        self.self_attention = SelfBranch(config, causal=True, name=name)
        cross = (
            CrossBranch(config, name=f"decoder.{layer} source") if config.encoder.layers else None
        )
        self.cross_attention = cross
        self.feed_forward = feed_forward(config, stack=config.decoder, layer=layer, side="decoder")
        self.arrangement = config.block

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
        memory: Memory,
    ) -> Stream:
        entered = self.entry(stream.x)
        read = self.arrangement.reads(stream.x, entered=entered)
        x = self.self_attention(stream.x, read=read, view=view)
        source = self.read(memory.states, packing=memory.packing)
        look = Look(entered, source, memory.packing.key_mask)
        return self._rest(replace(stream, x=x), view=view, look=look)

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
        entered = self.entry(stream.x)
        read = self.arrangement.reads(stream.x, entered=entered)
        x = self.self_attention.step(stream.x, read=read, view=view, cache=cache, position=position)
        look = Look(entered, source, mask)
        return self._rest(replace(stream, x=x), view=view, look=look)

    def _rest(self, stream: Stream, *, view: View, look: Look) -> Stream:
        reads = self.arrangement.reads
        if self.cross_attention is not None and look.source is not None:
            read = reads(stream.x, entered=look.entered)
            x = self.cross_attention(
                stream.x, read=read, view=view, source=look.source, mask=look.mask
            )
            stream = replace(stream, x=x)
        read = reads(stream.x, entered=look.entered)
        return self.feed_forward(stream, read=read, view=view)


def feed_forward(
    config: Blueprint, *, stack: Stack, layer: int, side: str
) -> DenseBranch | SparseBranch:
    """Make a block's last branch: dense, or sparse where the stack says so."""
    sparse, layers = config.sparse(stack, layer=layer), stack.sparse_layers
    name = f"{side}.{layer} feed-forward"
    if isinstance(sparse, NoMoE):
        return DenseBranch(config, name=name)
    dim, feed, bias = config.dim, config.feed_forward, config.bias
    if not isinstance(sparse, MoE):
        own = sparse.build(feed_forward=feed, dim=dim, bias=bias)
        return SparseBranch(config, inner=own, name=name)
    place = Place(f"{side}.{layer}", index=layers.index(layer), count=len(layers))
    experts = MoELayer(sparse, dim=dim, feed_forward=feed, bias=bias, place=place)
    return SparseBranch(config, inner=experts, name=name)
