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


def keep_all(packing: Packing) -> Packing:
    """Hold all tokens of a batch here."""
    return packing


def straight(block: nn.Module, stream: Stream, **parts: Any) -> Stream:
    """Pass a stream through a block, keeping what its backward needs."""
    return block(stream, **parts)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two stacks, and what its routers share."""

    name: str
    stack: Stack
    routing: SharedRouting | None


class Transformer(nn.Module):
    """Built by ``build(config)``; on the meta device it holds no numbers.

    ``deal`` says which tokens of a batch are held here, ``passing`` what is kept of a block.
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
        initialise(self, config)

    def forward(self, batch: Batch) -> Output:
        """Return decoder states at the predicted positions and the routing records."""
        memory, heard = self._encode(batch.source, key=batch.key)
        real = (batch.target_in != PAD) | (batch.target_out != PAD)
        packing = self.deal(Packing.of(real))
        ids = batch.target_in.flatten()[packing.index]
        rows = Rows(batch.target_in[:, 0], batch.key)
        stream, view = self._enter(ids, packing=packing, rows=rows, side=self._decoder_side)
        for block in self._decoder_blocks:
            stream = self.passing(block, stream, view=view, memory=memory)
        x = stream.x
        label = batch.target_out.flatten()[packing.index[packing.own]]
        row = packing.row[packing.own]
        if batch.num_predicted < packing.num_tokens:
            scored = (label != PAD).nonzero()[:, 0]
            x, label, row = x.index_select(0, scored), label[scored], row[scored]
        return Output(self.decoder_norm(x), label, row, heard + stream.records)

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
        return self._encode(source, key=torch.zeros_like(source[:, :1].sum(1)))[0]

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
        stream, view = self._enter(
            ids.flatten()[packing.index],
            packing=packing,
            rows=Rows(cache.tag, torch.zeros_like(cache.tag)),
            side=self._decoder_side,
            past=Past(position, cache.routing),
        )
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
    def _decoder_side(self) -> Side:
        return Side("decoder", self.config.decoder, self.decoder_routing)

    def _shared_routing(self, stack: Stack, *, causal: bool) -> SharedRouting | None:
        """What the MoE layers of a stack share, if their routers are linked."""
        moe = self.config.mixture(stack)
        if not isinstance(moe, MoE) or not stack.sparse_layers:
            return None
        first = self.config.experts(stack, layer=stack.sparse_layers[0]) or moe
        return moe.link.shared(dim=self.config.dim, experts=first.routed, causal=causal)

    def _encode(
        self, source: Int[Tensor, "B S"], *, key: Int[Tensor, "B"]
    ) -> tuple[Memory, Records]:
        packing = self.deal(Packing.of(source != PAD))
        if not self.encoder:
            return Memory(self.embedding.weight.new_zeros(0, self.config.dim), packing), ()
        ids = source.flatten()[packing.index]
        rows = Rows(source[:, 0], key)
        side = Side("encoder", self.config.encoder, self.encoder_routing)
        stream, view = self._enter(ids, packing=packing, rows=rows, side=side)
        for block in self.encoder:
            stream = self.passing(block, stream, view=view)
        return Memory(self.encoder_norm(stream.x), packing), stream.records

    def _enter(
        self,
        ids: Int[Tensor, "T"],
        *,
        packing: Packing,
        rows: Rows,
        side: Side,
        past: Past | None = None,
    ) -> tuple[Stream, View]:
        place = packing.position if past is None else past.position.flatten()[packing.index]
        own, row = packing.own, packing.row[packing.own]
        embedded = self.embedding(ids[own])
        moe = self.config.mixture(side.stack)
        reads = moe.condition.reads() if isinstance(moe, MoE) else "nothing"
        context = Context(
            row=row,
            position=place[own],
            token=ids[own],
            tag=rows.tag[row],
            row_key=rows.key[row],
            embedded=embedded if reads == "token" else None,
            prompt=self.embedding(rows.tag)[row] if reads == "prompt" else None,
        )
        placed = self.position.add(embedded, position=context.position)
        x = self.dropout(placed, context=context.at(side.name))
        sight = Sight(packing, place[packing.met], past)
        carry = Carry() if side.routing is None else side.routing.start(x, sight=sight)
        return Stream(x, carry), View(packing, self.position.rotation(sight.position), context)
