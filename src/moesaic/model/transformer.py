"""Transformer: an encoder-decoder or a decoder-only language model over the packed stream.

Letters: B rows, S source length, L target length, T real tokens, N predicted tokens, D model dim,
V vocabulary, n new tokens.

What a model returns in training: states where a token is predicted, and the routing records.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import PAD, Batch
from moesaic.model.block import (
    BlockState,
    DecoderBlock,
    Dropout,
    EncoderBlock,
    ForwardContext,
)
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.kv_cache import EncoderOutput, KVCache
from moesaic.model.partial_forward import BlockRange, PartialForward, StageIO
from moesaic.model.weights import ParameterKind, initialize_weights, parameter_kinds
from moesaic.moe.config import MoE
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_logits import RouterDecodeState, SharedRouter, StackInput
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.embedding import Embedding
from moesaic.nn.packing import Packing
from moesaic.ops.cross_entropy import TokenLoss


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Decoder states at the predicted positions only, in row-major order.

    Logits are not made here: ``model.logits(hidden)`` or a chunked loss makes them, so a batch
    never pays for positions that nobody scores.
    """

    hidden: Float[Tensor, "N D"]
    label: Int[Tensor, "N"]
    row: Int[Tensor, "N"]
    records: tuple[RoutingRecord, ...]


@dataclass(frozen=True, slots=True)
class RowMetadata:
    """What routers may know of a batch's rows: the first token of each, and its key."""

    tag: Int[Tensor, "B"]
    key: Int[Tensor, "B"]


SequenceSharding = Callable[[Packing], Packing]


RunBlock = Callable[..., BlockState]


AttachEncoder = Callable[[Tensor, Tensor], Tensor]


def no_sequence_sharding(packing: Packing) -> Packing:
    """Hold all tokens of a batch here."""
    return packing


def no_attachment(x: Float[Tensor, "T D"], memory: Float[Tensor, "S D"]) -> Float[Tensor, "T D"]:
    """Enter the decoder without a look at what was read."""
    del memory
    return x


def run_block(block: nn.Module, stream: BlockState, **parts: Any) -> BlockState:
    """Pass a stream through a block, keeping what its backward needs."""
    return block(stream, **parts)


@dataclass(frozen=True, slots=True)
class StackSpec:
    """One of the two stacks, and what its routers share."""

    name: str
    stack: Stack
    routing: SharedRouter | None


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """All tokens of a batch that a stack sees, and where they are in their rows."""

    ids: Int[Tensor, "T"]
    packing: Packing
    position: Int[Tensor, "T"]
    rows: RowMetadata
    decode_state: RouterDecodeState | None = None


class Transformer(nn.Module):
    """Built by ``build(config)``; on the meta device it holds no numbers.

    ``deal`` says which tokens of a batch are held here, ``passing`` what is kept of a block, and
    ``attach_encoder`` what the decoder's first states have to do with what was read.
    """

    def __init__(self, config: ModelConfig) -> None:
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
        self.sequence_sharding: SequenceSharding = no_sequence_sharding
        self.run_block: RunBlock = run_block
        self.attach_encoder: AttachEncoder = no_attachment
        initialize_weights(self, config)

    def forward(self, batch: Batch) -> ModelOutput:
        """Return decoder states at the predicted positions and the routing records."""
        return self.output_of(
            self.forward_blocks(batch, blocks=BlockRange.all_blocks(self.config)), batch=batch
        )

    def forward_blocks(
        self, batch: Batch, *, blocks: BlockRange, stage_input: StageIO | None = None
    ) -> PartialForward:
        """Pass a batch through the blocks of a leg, from what the leg before it handed on."""
        stage_input = stage_input or StageIO()
        reached = PartialForward()
        if blocks.encoder:
            reached = self._forward_encoder(
                batch.source, key=batch.key, blocks=blocks.encoder, given=stage_input
            )
            stage_input = StageIO()
        elif stage_input.encoder_states is not None:
            packing = self.sequence_sharding(Packing.from_mask(batch.source != PAD))
            reached = PartialForward(
                encoder_output=EncoderOutput(stage_input.encoder_states, packing)
            )
        if not blocks.decoder:
            return reached
        return self._forward_decoder(batch, blocks=blocks.decoder, given=stage_input, read=reached)

    def output_of(self, end: PartialForward, *, batch: Batch) -> ModelOutput:
        """Return the output of a pass that has come through all blocks."""
        if end.state is None or end.context is None:
            raise TypeError("a pass must come through the decoder before it is scored")
        packing, x = end.context.packing, end.state.x
        label = batch.target_out.flatten()[packing.index[packing.local_tokens]]
        row = packing.row[packing.local_tokens]
        if batch.num_predicted < packing.num_tokens:
            scored = (label != PAD).nonzero()[:, 0]
            x, label, row = x.index_select(0, scored), label[scored], row[scored]
        return ModelOutput(self.decoder_norm(x), label, row, end.records)

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Float32 logits of states."""
        return self.embedding.logits(hidden)

    def loss(self, output: ModelOutput, *, smoothing: float = 0.0, z: float = 0.0) -> TokenLoss:
        """Summed token loss of an output, computed in chunks (``ops/cross_entropy.py``)."""
        return self.embedding.loss(output.hidden, label=output.label, smoothing=smoothing, z=z)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """Parameter name -> embedding, norm, bias, matrix, expert or router."""
        return parameter_kinds(self)

    def encode(self, source: Int[Tensor, "B S"]) -> EncoderOutput:
        """Read a batch of sources for ``start``."""
        if not self.encoder:
            none = self.embedding.weight.new_zeros(0, self.config.dim)
            return EncoderOutput(none, self.sequence_sharding(Packing.from_mask(source != PAD)))
        key = torch.zeros_like(source[:, :1].sum(1))
        states = self._forward_encoder(
            source, key=key, blocks=range(len(self.encoder)), given=StageIO()
        )
        assert states.encoder_output is not None
        return states.encoder_output

    def init_cache(self, encoder_output: EncoderOutput, rows: Int[Tensor, "R"]) -> KVCache:
        """Begin decoding: hypothesis i reads the source ``rows[i]``."""
        config = self.config
        shape = (rows.numel(), config.self_attention.num_kv_heads(), 0, config.head_dim)
        empty = encoder_output.states.new_zeros(shape)
        source = [
            block.project_source(encoder_output.states, packing=encoder_output.packing)
            for block in self._decoder_blocks
        ]
        mask = encoder_output.packing.key_mask
        return KVCache(
            self_attention=[KeyValue(empty, empty) for _ in self.decoder],
            cross_attention=[layer.select(rows) if layer else None for layer in source],
            mask=None if mask is None else mask.index_select(0, rows),
            length=torch.zeros_like(rows),
            tag=torch.zeros_like(rows),
            routing=self.decoder_routing.empty_cache(rows.numel())
            if self.decoder_routing
            else None,
        )

    def step(self, ids: Int[Tensor, "B n"], cache: KVCache) -> Float[Tensor, "B V"]:
        """Append tokens to each row (``PAD`` on the right: fewer) and return its next logits."""
        real = ids != PAD
        packing = Packing.from_mask(real)
        position = cache.length[:, None] + torch.arange(ids.shape[1], device=ids.device)
        cache.reserve(int(position.max()) + 1)
        cache.tag = torch.where(cache.length == 0, ids[:, 0], cache.tag)
        tokens = PackedTokens(
            ids.flatten()[packing.index],
            packing,
            position.flatten()[packing.index],
            RowMetadata(cache.tag, torch.zeros_like(cache.tag)),
            RouterDecodeState(position, cache.routing),
        )
        view = self._forward_context(tokens, side=self._decoder_spec)
        stream = self._embed(tokens, context=view.routing_context, side=self._decoder_spec)
        for block, own, source in zip(
            self._decoder_blocks, cache.self_attention, cache.cross_attention, strict=True
        ):
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
    def _encoder_spec(self) -> StackSpec:
        return StackSpec("encoder", self.config.encoder, self.encoder_routing)

    @property
    def _decoder_spec(self) -> StackSpec:
        return StackSpec("decoder", self.config.decoder, self.decoder_routing)

    def _shared_routing(self, stack: Stack, *, causal: bool) -> SharedRouter | None:
        """What the MoE layers of a stack share, if their routers are linked."""
        moe = self.config.moe_of_stack(stack)
        if not isinstance(moe, MoE) or not stack.moe_layers:
            return None
        first = self.config.routed_moe_of_layer(stack, layer=stack.moe_layers[0]) or moe
        return moe.cross_layer.build_shared(
            dim=self.config.dim, experts=first.num_router_outputs, causal=causal
        )

    def _forward_encoder(
        self, source: Int[Tensor, "B S"], *, key: Int[Tensor, "B"], blocks: range, given: StageIO
    ) -> PartialForward:
        """Pass through blocks of the encoder; after the last one the source is read."""
        packing = self.sequence_sharding(Packing.from_mask(source != PAD))
        ids, rows = source.flatten()[packing.index], RowMetadata(source[:, 0], key)
        tokens, side = PackedTokens(ids, packing, packing.position, rows), self._encoder_spec
        view = self._forward_context(tokens, side=side)
        stream = _resume_state(given, side=side)
        if stream is None:
            stream = self._embed(tokens, context=view.routing_context, side=side)
        for index in blocks:
            stream = self.run_block(self.encoder[index], stream, view=view)
        if blocks.stop < len(self.encoder):
            return PartialForward(stream, view)
        memory = EncoderOutput(self.encoder_norm(stream.x), packing)
        return PartialForward(encoder_output=memory, encoder_records=stream.records)

    def _forward_decoder(
        self, batch: Batch, *, blocks: range, given: StageIO, read: PartialForward
    ) -> PartialForward:
        """Pass through blocks of the decoder, which look at what was read."""
        ids = batch.target_in
        packing = self.sequence_sharding(
            Packing.from_mask((ids != PAD) | (batch.target_out != PAD))
        )
        rows, ids = RowMetadata(ids[:, 0], batch.key), ids.flatten()[packing.index]
        tokens, side = PackedTokens(ids, packing, packing.position, rows), self._decoder_spec
        view, memory = (
            self._forward_context(tokens, side=side),
            read.encoder_output or self._no_encoder_output(batch.source),
        )
        stream = _resume_state(given, side=side)
        if stream is None:
            states = memory.states if self.config.encoder.layers else None
            stream = self._embed(tokens, context=view.routing_context, side=side, read=states)
        for block in list(self._decoder_blocks)[blocks.start : blocks.stop]:
            stream = self.run_block(block, stream, view=view, memory=memory)
        return PartialForward(stream, view, read.encoder_output, read.encoder_records)

    def _no_encoder_output(self, source: Int[Tensor, "B S"]) -> EncoderOutput:
        """What a model without an encoder knows of a source."""
        none = torch.zeros(0, self.config.dim, device=source.device)
        return EncoderOutput(none, self.sequence_sharding(Packing.from_mask(source != PAD)))

    def _forward_context(self, tokens: PackedTokens, *, side: StackSpec) -> ForwardContext:
        packing, rows, place = tokens.packing, tokens.rows, tokens.position
        own, row = packing.local_tokens, packing.row[packing.local_tokens]
        moe = self.config.moe_of_stack(side.stack)
        reads = moe.router_input.embedding_source() if isinstance(moe, MoE) else "nothing"
        context = TokenContext(
            row=row,
            position=place[own],
            token=tokens.ids[own],
            tag=rows.tag[row],
            row_key=rows.key[row],
            token_embedding=self.embedding(tokens.ids, packing=packing)
            if reads == "token"
            else None,
            tag_embedding=self.embedding.embed_replicated(rows.tag)[row]
            if reads == "prompt"
            else None,
        )
        return ForwardContext(
            packing, self.position.rotation(place[packing.gathered_tokens]), context
        )

    def _embed(
        self,
        tokens: PackedTokens,
        *,
        context: TokenContext,
        side: StackSpec,
        read: Float[Tensor, "S D"] | None = None,
    ) -> BlockState:
        packing, embedded = tokens.packing, context.token_embedding
        if embedded is None:
            embedded = self.embedding(tokens.ids, packing=packing)
        placed = self.position.add(embedded, position=context.position)
        x = self.dropout(placed, context=context.for_layer(side.name))
        x = x if read is None else self.attach_encoder(x, read)
        sight = StackInput(packing, tokens.position[packing.gathered_tokens], tokens.decode_state)
        carry = (
            RouterState()
            if side.routing is None
            else side.routing.initial_state(x, stack_input=sight)
        )
        return BlockState(x, carry)


def _resume_state(given: StageIO, *, side: StackSpec) -> BlockState | None:
    """The stream of the leg before this one; None where the stack is entered."""
    if given.x is None:
        return None
    return BlockState(given.x, RouterState(given.router_hidden, given.router_logits, side.routing))
