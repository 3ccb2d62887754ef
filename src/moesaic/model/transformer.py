"""Transformer: an encoder-decoder or a decoder-only language model over packed tokens.

A forward pass reads the batch's real tokens as one sequence [T, D] (``nn/packing.py``): encoder
blocks, decoder blocks, and the states that the head reads (``head.py``).
``parallel/parallelize.py`` splits a model over ranks; ``parallel/partial_forward.py`` passes
through some of the blocks.

Letters: B rows, S source length, T real tokens, t of them on this rank, N predicted tokens, D model
dim, V vocabulary, n new tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import Batch, InputRows
from moesaic.model.block import (
    BlockState,
    DecoderBlock,
    Dropout,
    EncoderBlock,
    ForwardContext,
    Records,
)
from moesaic.model.config import ModelConfig
from moesaic.model.head import Head, HeadLoss, ModelOutput, Predictions, mean_of_spans
from moesaic.model.kv_cache import EncoderOutput, KVCache
from moesaic.model.weights import weight_distributions
from moesaic.moe.config import MoE
from moesaic.moe.initial_weights import draw_whole, parameter_kinds
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import RouterShape, SharedRouter, StackInput
from moesaic.nn.decode_slots import DecodeSlots
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.embedding import Embedding
from moesaic.nn.initializer import allocate_whole, draw_seed, drop_values, parameters_on_meta
from moesaic.nn.packing import Packing
from moesaic.nn.relative_bias import RelativeBiasModule
from moesaic.nn.sequence_mixer import MixerContext
from moesaic.optim.optimizer import ParameterKind

SequenceSharding = Callable[[Packing], Packing]
RunBlock = Callable[..., BlockState]


@dataclass(frozen=True, slots=True)
class StackTokens:
    """The tokens that a stack (``encoder`` or ``decoder``) embeds, on whichever rank each is.

    ``values`` are their ids, or the values of an input that has none. ``tag`` is the first id of
    each row (0 without ids), ``row_key`` the key of the row's random numbers. In decoding ``slots``
    says where all tokens so far are cached, and ``routing`` is the decode state of a shared router.
    """

    stack: str
    values: Int[Tensor, "T"] | Float[Tensor, "T C"]
    packing: Packing
    position: Int[Tensor, "T"]
    tag: Int[Tensor, "B"]
    row_key: Int[Tensor, "B"]
    slots: DecodeSlots | None = None
    routing: DecodeState | None = None


def no_sequence_sharding(packing: Packing) -> Packing:
    """Keep all tokens of a batch on this rank."""
    return packing


def run_block(block: nn.Module, state: BlockState, **inputs: Any) -> BlockState:
    """Run a block and save its activations for backward."""
    return block(state, **inputs)


class Transformer(nn.Module):
    """The model of a ``ModelConfig``; weights are drawn with a seed of torch's global generator.

    Under ``with torch.device("meta")`` nothing is allocated; ``without_values`` leaves only the
    parameters there. ``distributions`` are those of the weights, by name; ``sequence_sharding``
    returns which tokens of a batch this rank holds; ``run_block`` calls a block (activation
    checkpointing).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        seed = draw_seed()
        self._make(config)
        allocate_whole(self)
        draw_whole(self, self.distributions, seed=seed)

    @classmethod
    def without_values(
        cls, config: ModelConfig, *, layers: Mapping[str, Sequence[int]] | None = None
    ) -> "Transformer":
        """Make a whole model with its parameters on the meta device, to be cut and then started.

        Buffers have their values. ``layers`` are the blocks of each stack that are made.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._make(config, layers)
        drop_values(model)
        return model

    def _make(self, config: ModelConfig, layers: Mapping[str, Sequence[int]] | None = None) -> None:
        self.config = config
        with parameters_on_meta():
            self._make_modules(config, layers or {})
        self.sequence_sharding: SequenceSharding = no_sequence_sharding
        self.run_block: RunBlock = run_block
        self.distributions = weight_distributions(self, config)

    def _make_modules(self, config: ModelConfig, layers: Mapping[str, Sequence[int]]) -> None:
        self.embedding = config.input.build(config.input_shape)
        self.position = config.position.build(config.dim)
        self.dropout = Dropout(config.dropout, name="embedding")
        self.encoder = nn.ModuleList(
            EncoderBlock(config, layer=i)
            for i in layers.get("encoder", range(config.encoder.layers))
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(config, layer=i)
            for i in layers.get("decoder", range(config.decoder.layers))
        )
        self.encoder_score_bias = _score_bias(config, side="encoder")
        self.decoder_score_bias = _score_bias(config, side="decoder")
        self.encoder_routing = _shared_router(config, side="encoder")
        self.decoder_routing = _shared_router(config, side="decoder")
        if config.encoder.layers:
            self.encoder_norm = config.norm.build(config.dim)
        self.decoder_norm = config.norm.build(config.dim)
        self.head = config.head.build(config.head_shape)

    def forward(self, batch: Batch) -> ModelOutput:
        """Return the states that the head reads, with their labels, and the routing records."""
        encoder_output, records = self._encode(batch.source, row_key=batch.key)
        tokens = self.decoder_tokens(batch)
        context = self.forward_context(tokens)
        state = self.embed(tokens, context=context)
        for block in self.decoder:
            state = self.run_block(block, state, context=context, encoder_output=encoder_output)
        return self.output(state, batch=batch, packing=tokens.packing, encoder_records=records)

    def output(
        self, state: BlockState, *, batch: Batch, packing: Packing, encoder_records: Records
    ) -> ModelOutput:
        """Return the output of a pass, given what the last decoder block returned."""
        chosen, x = _predictions(self.config.head, batch, packing), state.x
        if chosen.index is not None:
            x = x.index_select(0, chosen.index)
        hidden, records = self.decoder_norm(x), encoder_records + state.records
        if chosen.lengths is not None:
            hidden = mean_of_spans(hidden, chosen.lengths)
        return ModelOutput(hidden, chosen.label, chosen.row, records, chosen.sizes)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def predict(self, hidden: Float[Tensor, "K D"]) -> Float[Tensor, "K *P"]:
        """Return the head's predictions for these states: logits over the vocabulary, or others."""
        return self.head(hidden, source=self.embedding)

    def loss(self, output: ModelOutput) -> HeadLoss:
        """Return the head's summed loss of an output."""
        return self.head.loss(output, source=self.embedding)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """Parameter name -> embedding, norm, bias, matrix, expert or router."""
        return parameter_kinds(self)

    def encode(self, source: InputRows) -> EncoderOutput | None:
        """Run the encoder on a batch of sources for ``init_cache``; None if there is no encoder."""
        return self._encode(source, row_key=torch.zeros_like(source.lengths))[0]

    def init_cache(self, encoder_output: EncoderOutput | None, *, rows: int) -> KVCache:
        """Return an empty cache for decoding: one hypothesis for each of ``rows`` sources."""
        assert self.config.is_causal("decoder"), "a decoder that reads later tokens cannot decode"
        shared = self.decoder_routing
        like = encoder_output.states if encoder_output else next(self.embedding.parameters())
        zeros = torch.zeros(rows, dtype=torch.long, device=like.device)
        return KVCache(
            mixers=[block.init_states(rows, like=like) for block in self._decoder_blocks],
            cross_attention=[
                block.project_source(encoder_output) for block in self._decoder_blocks
            ],
            mask=encoder_output.packing.key_mask if encoder_output else None,
            slots=DecodeSlots.empty(rows, device=like.device),
            length=zeros,
            tag=zeros,
            routing=shared.init_state(rows) if shared else None,
        )

    def step(self, tokens: InputRows, cache: KVCache) -> Float[Tensor, "B V"]:
        """Append tokens to each row (at least one) and return its next logits.

        Of another head than a vocabulary's it returns the prediction for the last token.
        """
        values, single = tokens.values, tokens.width == 1
        packing = cache.single if single else packing_of(tokens)
        if not cache.slots.used:
            cache.tag = tokens.tags
        cache.slots.append(cache.length, packing)
        stack_tokens = StackTokens(
            "decoder",
            values[:, 0] if single else values.flatten(0, 1)[packing.index],
            packing,
            cache.length if single else cache.length[packing.row] + packing.position,
            cache.tag,
            torch.zeros_like(cache.tag),
            slots=cache.slots,
            routing=cache.routing,
        )
        context = self.forward_context(stack_tokens)
        state = self.embed(stack_tokens, context=context)
        for block, states, source in zip(
            self._decoder_blocks, cache.mixers, cache.cross_attention, strict=True
        ):
            state = block.step(
                state, context=context, states=states, source=source, mask=cache.mask
            )
        cache.length = cache.length + (1 if single else tokens.lengths)
        last = state.x if single else state.x[tokens.lengths.cumsum(0) - 1]
        return self.predict(self.decoder_norm(last))

    def encoder_tokens(self, source: InputRows, *, row_key: Int[Tensor, "B"]) -> StackTokens:
        """Return the tokens that the encoder reads."""
        return self._stack_tokens("encoder", source, row_key=row_key)

    def decoder_tokens(self, batch: Batch) -> StackTokens:
        """Return the tokens that the decoder reads."""
        return self._stack_tokens("decoder", batch.target, row_key=batch.key)

    def forward_context(self, tokens: StackTokens) -> ForwardContext:
        """Return what every block of the stack needs beside the states of these tokens."""
        packing, local = tokens.packing, tokens.packing.local_tokens
        row = packing.row[local]
        moe = self.config.moe_of_stack(self.config.stack_of(tokens.stack))
        source = moe.router_input.embedding_source if isinstance(moe, MoE) else "nothing"
        embedded = self.embedding(tokens.values, packing=packing) if source == "token" else None
        prompt = self._embed_tags(tokens.tag)[row] if source == "tag" else None
        routing_context = TokenContext(
            row=row,
            position=tokens.position[local],
            token=token_ids(tokens.values)[local],
            tag=tokens.tag if packing.is_single else tokens.tag[row],
            row_key=tokens.row_key if packing.is_single else tokens.row_key[row],
            token_embedding=embedded,
            tag_embedding=prompt,
            num_rows=len(tokens.row_key),
        )
        gathered = tokens.position[packing.gathered_tokens]
        table = self.encoder_score_bias if tokens.stack == "encoder" else self.decoder_score_bias
        mixing = MixerContext(
            packing,
            gathered,
            causal=self.config.is_causal(tokens.stack),
            slots=tokens.slots,
            score_bias=None if table is None else table(),
        )
        return ForwardContext(mixing, routing_context)

    def embed(self, tokens: StackTokens, *, context: ForwardContext) -> BlockState:
        """Return the input of a stack's first block: embeddings with positions and dropout."""
        packing, routing = context.packing, context.routing_context
        embedded = routing.token_embedding
        if embedded is None:
            embedded = self.embedding(tokens.values, packing=packing)
        placed = self.position.add(embedded, routing.position)
        x = self.dropout(placed, context=routing.for_layer(tokens.stack))
        shared = self.shared_router(tokens.stack)
        if shared is None:
            return BlockState(x, RouterState())
        stack_input = StackInput(context.mixing, tokens.routing)
        return BlockState(x, shared.initial_state(x, stack_input=stack_input))

    def shared_router(self, stack: str) -> SharedRouter | None:
        """Return the module that the routers of a stack share, if they are coupled."""
        return self.encoder_routing if stack == "encoder" else self.decoder_routing

    def _embed_tags(self, tag: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        assert isinstance(self.embedding, Embedding), "routers read tags of token ids"
        return self.embedding.embed_replicated(tag)

    @property
    def _decoder_blocks(self) -> Iterable[DecoderBlock]:
        return cast("Iterable[DecoderBlock]", self.decoder)

    def _encode(
        self, source: InputRows, *, row_key: Int[Tensor, "B"]
    ) -> tuple[EncoderOutput | None, Records]:
        if not self.encoder:
            return None, ()
        tokens = self.encoder_tokens(source, row_key=row_key)
        context = self.forward_context(tokens)
        state = self.embed(tokens, context=context)
        for block in self.encoder:
            state = self.run_block(block, state, context=context)
        return EncoderOutput(self.encoder_norm(state.x), tokens.packing), state.records

    def _stack_tokens(
        self, stack: str, rows: InputRows, *, row_key: Int[Tensor, "B"]
    ) -> StackTokens:
        # planned on the host where it has the lengths: it does not wait for the device then
        lengths = rows.lengths if rows.host_lengths is None else rows.host_lengths
        packing = Packing.from_lengths(lengths, length=rows.width)
        packing = self.sequence_sharding(packing).to(rows.device)
        packed = rows.values.flatten(0, 1)[packing.index]
        return StackTokens(stack, packed, packing, packing.position, rows.tags, row_key)


def token_ids(values: Int[Tensor, "*N"] | Float[Tensor, "*N C"]) -> Int[Tensor, "*N"]:
    """Return the ids of an input, zeros where its values are no ids."""
    if values.is_floating_point():
        return torch.zeros(values.shape[:-1], dtype=torch.long, device=values.device)
    return values


def _predictions(head: Head, batch: Batch, packing: Packing) -> Predictions:
    """Return what is predicted on the device of a batch, selected on the host if that has it."""
    if batch.host is None or packing.host is None:
        return head.select(batch, packing=packing)
    return head.select(batch.host, packing=packing.host).to(batch.device)


def packing_of(rows: InputRows) -> Packing:
    """Return where the real entries of the rows are."""
    return Packing.from_lengths(rows.lengths, length=rows.width)


def _score_bias(config: ModelConfig, *, side: str) -> RelativeBiasModule | None:
    """Build the bias of the attention scores of a stack, if its positions have one."""
    if not config.stack_of(side).layers:
        return None
    heads = config.attention.heads
    return config.position.build_score_bias(heads, causal=config.is_causal(side))


def _shared_router(config: ModelConfig, *, side: str) -> SharedRouter | None:
    """Build what the MoE layers of a stack share, if their routers are coupled across layers."""
    stack, causal = config.stack_of(side), config.is_causal(side)
    moe = config.moe_of_stack(stack)
    if not isinstance(moe, MoE) or not stack.moe_layers:
        return None
    first = config.routed_moe_of_layer(stack, layer=stack.moe_layers[0]) or moe
    return moe.cross_layer.build_shared(
        RouterShape(config.dim, first.num_router_outputs, causal=causal)
    )
