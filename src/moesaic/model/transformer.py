"""Transformer: an encoder-decoder or a decoder-only language model over the packed stream.

Letters: B rows, S source length, L target length, T real tokens, N predicted tokens, D model dim,
V vocabulary, n new tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import PAD, Batch
from moesaic.model.block import DecoderBlock, EncoderBlock, Records, Stream, View
from moesaic.model.blueprint import Blueprint, Stack
from moesaic.model.cache import Cache, Memory
from moesaic.model.dropout import Dropout
from moesaic.model.init import Kind, initialise, parameter_kinds
from moesaic.model.leg import Handed, Leg
from moesaic.model.output import Output
from moesaic.moe.config import MoE
from moesaic.moe.context import Carry, Context
from moesaic.moe.gates import Past, SharedRouting, Sight
from moesaic.nn.embedding import Embedding
from moesaic.nn.looking import KeyValue
from moesaic.nn.packing import Packing
from moesaic.ops.cross_entropy import TokenLoss


@dataclass(frozen=True, slots=True)
class Rows:
    """What routers may know of a batch's rows: the first token of each, and its key."""

    tag: Int[Tensor, "B"]
    key: Int[Tensor, "B"]


Deal = Callable[[Packing], Packing]
Passing = Callable[..., Stream]
Joining = Callable[[Tensor, Tensor], Tensor]


def keep_all(packing: Packing) -> Packing:
    """Hold all tokens of a batch here."""
    return packing


def apart(x: Float[Tensor, "T D"], memory: Float[Tensor, "S D"]) -> Float[Tensor, "T D"]:
    """Enter the decoder without a look at what was read."""
    del memory
    return x


def straight(block: nn.Module, stream: Stream, **parts: Any) -> Stream:
    """Pass a stream through a block, keeping what its backward needs."""
    return block(stream, **parts)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two stacks, and what its routers share."""

    name: str
    stack: Stack
    routing: SharedRouting | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens of a batch that a stack sees, and where they are in their rows."""

    ids: Int[Tensor, "T"]
    packing: Packing
    place: Int[Tensor, "T"]
    rows: Rows
    past: Past | None = None


@dataclass(frozen=True, slots=True)
class Reached:
    """A pass that has come to the end of a leg.

    ``stream`` and ``view`` are those of the stack it is in, None between the two; ``heard`` are
    the encoder's records.
    """

    stream: Stream | None = None
    view: View | None = None
    memory: Memory | None = None
    heard: Records = ()

    @property
    def records(self) -> Records:
        """The routing records of the leg."""
        return self.heard + (self.stream.records if self.stream else ())

    @property
    def handed(self) -> Handed:
        """What the next leg needs of this one."""
        memory = self.memory.states if self.memory else None
        if self.stream is None:
            return Handed(memory=memory)
        carry = self.stream.carry
        return Handed(self.stream.x, carry.hidden, carry.logits, memory)


class Transformer(nn.Module):
    """Built by ``build(config)``; on the meta device it holds no numbers.

    ``deal`` says which tokens of a batch are held here, ``passing`` what is kept of a block, and
    ``joining`` what the decoder's first states have to do with what was read.
    """

    def __init__(self, config: Blueprint) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.embedding, vocab_size=config.vocab_size, dim=config.dim)
        self.position = config.position.build(dim=config.dim, head_dim=config.head_dim)
        self.dropout = Dropout(config.dropout, name="embedding")
        self.encoder = nn.ModuleList(
            EncoderBlock(config, layer=i) for i in range(config.encoder.layers)
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(config, layer=i) for i in range(config.decoder.layers)
        )
        self.encoder_routing = self._shared_routing(config.encoder, causal=False)
        self.decoder_routing = self._shared_routing(config.decoder, causal=True)
        if config.encoder.layers:
            self.encoder_norm = config.norm.build(config.dim)
        self.decoder_norm = config.norm.build(config.dim)
        self.deal: Deal = keep_all
        self.passing: Passing = straight
        self.joining: Joining = apart
        initialise(self, config)

    def forward(self, batch: Batch) -> Output:
        """Return decoder states at the predicted positions and the routing records."""
        return self.finish(self.travel(batch, leg=Leg.whole(self.config)), batch=batch)

    def travel(self, batch: Batch, *, leg: Leg, given: Handed | None = None) -> Reached:
        """Pass a batch through the blocks of a leg, from what the leg before it handed on."""
        given = given or Handed()
        reached = Reached()
        if leg.encoder:
            reached = self._read(batch.source, key=batch.key, blocks=leg.encoder, given=given)
            given = Handed()
        elif given.memory is not None:
            packing = self.deal(Packing.of(batch.source != PAD))
            reached = Reached(memory=Memory(given.memory, packing))
        if not leg.decoder:
            return reached
        return self._write(batch, blocks=leg.decoder, given=given, read=reached)

    def finish(self, end: Reached, *, batch: Batch) -> Output:
        """Return the output of a pass that has come through all blocks."""
        if end.stream is None or end.view is None:
            raise TypeError("a pass must come through the decoder before it is scored")
        packing, x = end.view.packing, end.stream.x
        label = batch.target_out.flatten()[packing.index[packing.own]]
        row = packing.row[packing.own]
        if batch.num_predicted < packing.num_tokens:
            scored = (label != PAD).nonzero()[:, 0]
            x, label, row = x.index_select(0, scored), label[scored], row[scored]
        return Output(self.decoder_norm(x), label, row, end.records)

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Float32 logits of states."""
        return self.embedding.logits(hidden)

    def loss(self, output: Output, *, smoothing: float = 0.0, z: float = 0.0) -> TokenLoss:
        """Summed token loss of an output, computed in chunks (``ops/cross_entropy.py``)."""
        return self.embedding.loss(output.hidden, label=output.label, smoothing=smoothing, z=z)

    def parameter_kinds(self) -> dict[str, Kind]:
        """Parameter name -> embedding, norm, bias, matrix, expert or router."""
        return parameter_kinds(self)

    def encode(self, source: Int[Tensor, "B S"]) -> Memory:
        """Read a batch of sources for ``start``."""
        if not self.encoder:
            none = self.embedding.weight.new_zeros(0, self.config.dim)
            return Memory(none, self.deal(Packing.of(source != PAD)))
        key = torch.zeros_like(source[:, :1].sum(1))
        states = self._read(source, key=key, blocks=range(len(self.encoder)), given=Handed())
        assert states.memory is not None
        return states.memory

    def start(self, memory: Memory, rows: Int[Tensor, "R"]) -> Cache:
        """Begin decoding: hypothesis i reads the source ``rows[i]``."""
        config = self.config
        shape = (rows.numel(), config.self_attention.groups(), 0, config.head_dim)
        empty = memory.states.new_zeros(shape)
        source = [
            block.read(memory.states, packing=memory.packing) for block in self._decoder_blocks
        ]
        mask = memory.packing.key_mask
        return Cache(
            own=[KeyValue(empty, empty) for _ in self.decoder],
            source=[layer.select(rows) if layer else None for layer in source],
            mask=None if mask is None else mask.index_select(0, rows),
            length=torch.zeros_like(rows),
            tag=torch.zeros_like(rows),
            routing=self.decoder_routing.memory(rows.numel()) if self.decoder_routing else None,
        )

    def step(self, ids: Int[Tensor, "B n"], cache: Cache) -> Float[Tensor, "B V"]:
        """Append tokens to each row (``PAD`` on the right: fewer) and return its next logits."""
        real = ids != PAD
        packing = Packing.of(real)
        position = cache.length[:, None] + torch.arange(ids.shape[1], device=ids.device)
        cache.reserve(int(position.max()) + 1)
        cache.tag = torch.where(cache.length == 0, ids[:, 0], cache.tag)
        tokens = Tokens(
            ids.flatten()[packing.index],
            packing,
            position.flatten()[packing.index],
            Rows(cache.tag, torch.zeros_like(cache.tag)),
            Past(position, cache.routing),
        )
        view = self._view(tokens, side=self._decoder_side)
        stream = self._enter(tokens, context=view.context, side=self._decoder_side)
        for block, own, source in zip(self._decoder_blocks, cache.own, cache.source, strict=True):
            stream = block.step(
                stream, view=view, cache=own, position=position, source=source, mask=cache.mask
            )
        count = real.sum(1)
        cache.length = cache.length + count
        return self.logits(self.decoder_norm(stream.x[count.cumsum(0) - 1]))

    @property
    def _decoder_blocks(self) -> Iterable[DecoderBlock]:
        return cast("Iterable[DecoderBlock]", self.decoder)

    @property
    def _encoder_side(self) -> Side:
        return Side("encoder", self.config.encoder, self.encoder_routing)

    @property
    def _decoder_side(self) -> Side:
        return Side("decoder", self.config.decoder, self.decoder_routing)

    def _shared_routing(self, stack: Stack, *, causal: bool) -> SharedRouting | None:
        """What the MoE layers of a stack share, if their routers are linked."""
        moe = self.config.mixture(stack)
        if not isinstance(moe, MoE) or not stack.sparse_layers:
            return None
        first = self.config.experts(stack, layer=stack.sparse_layers[0]) or moe
        return moe.link.shared(dim=self.config.dim, experts=first.routed, causal=causal)

    def _read(
        self, source: Int[Tensor, "B S"], *, key: Int[Tensor, "B"], blocks: range, given: Handed
    ) -> Reached:
        """Pass through blocks of the encoder; after the last one the source is read."""
        packing = self.deal(Packing.of(source != PAD))
        ids, rows = source.flatten()[packing.index], Rows(source[:, 0], key)
        tokens, side = Tokens(ids, packing, packing.position, rows), self._encoder_side
        view = self._view(tokens, side=side)
        stream = _taken_up(given, side=side)
        if stream is None:
            stream = self._enter(tokens, context=view.context, side=side)
        for index in blocks:
            stream = self.passing(self.encoder[index], stream, view=view)
        if blocks.stop < len(self.encoder):
            return Reached(stream, view)
        memory = Memory(self.encoder_norm(stream.x), packing)
        return Reached(memory=memory, heard=stream.records)

    def _write(self, batch: Batch, *, blocks: range, given: Handed, read: Reached) -> Reached:
        """Pass through blocks of the decoder, which look at what was read."""
        ids = batch.target_in
        packing = self.deal(Packing.of((ids != PAD) | (batch.target_out != PAD)))
        rows, ids = Rows(ids[:, 0], batch.key), ids.flatten()[packing.index]
        tokens, side = Tokens(ids, packing, packing.position, rows), self._decoder_side
        view, memory = self._view(tokens, side=side), read.memory or self._unread(batch.source)
        stream = _taken_up(given, side=side)
        if stream is None:
            states = memory.states if self.config.encoder.layers else None
            stream = self._enter(tokens, context=view.context, side=side, read=states)
        for block in list(self._decoder_blocks)[blocks.start : blocks.stop]:
            stream = self.passing(block, stream, view=view, memory=memory)
        return Reached(stream, view, read.memory, read.heard)

    def _unread(self, source: Int[Tensor, "B S"]) -> Memory:
        """What a model without an encoder knows of a source."""
        none = torch.zeros(0, self.config.dim, device=source.device)
        return Memory(none, self.deal(Packing.of(source != PAD)))

    def _view(self, tokens: Tokens, *, side: Side) -> View:
        packing, rows, place = tokens.packing, tokens.rows, tokens.place
        own, row = packing.own, packing.row[packing.own]
        moe = self.config.mixture(side.stack)
        reads = moe.condition.reads() if isinstance(moe, MoE) else "nothing"
        context = Context(
            row=row,
            position=place[own],
            token=tokens.ids[own],
            tag=rows.tag[row],
            row_key=rows.key[row],
            embedded=self.embedding(tokens.ids, packing=packing) if reads == "token" else None,
            prompt=self.embedding.alike(rows.tag)[row] if reads == "prompt" else None,
        )
        return View(packing, self.position.rotation(place[packing.met]), context)

    def _enter(
        self,
        tokens: Tokens,
        *,
        context: Context,
        side: Side,
        read: Float[Tensor, "S D"] | None = None,
    ) -> Stream:
        packing, embedded = tokens.packing, context.embedded
        if embedded is None:
            embedded = self.embedding(tokens.ids, packing=packing)
        placed = self.position.add(embedded, position=context.position)
        x = self.dropout(placed, context=context.at(side.name))
        x = x if read is None else self.joining(x, read)
        sight = Sight(packing, tokens.place[packing.met], tokens.past)
        carry = Carry() if side.routing is None else side.routing.start(x, sight=sight)
        return Stream(x, carry)


def _taken_up(given: Handed, *, side: Side) -> Stream | None:
    """The stream of the leg before this one; None where the stack is entered."""
    if given.x is None:
        return None
    return Stream(given.x, Carry(given.hidden, given.logits, side.routing))
