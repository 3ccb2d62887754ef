"""Partial forward passes: a pipeline stage's range of a model's blocks, its input and its output.

The chain of a model is the encoder's blocks, then the decoder's. A stage may end after any block.
Only states go to the next stage; packing, rotation and labels are computed again from its own copy
of the batch.

Letters: T tokens of the stack in progress, S source tokens, D model dim, P width of a router's
state, E experts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Tensor
from moesaic.data.batch import Batch
from moesaic.model.block import BlockState, ForwardContext, Records
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.head import ModelOutput
from moesaic.model.kv_cache import EncoderOutput
from moesaic.model.transformer import StackTokens, Transformer, packing_of
from moesaic.moe.config import MoE
from moesaic.moe.router_context import RouterState
from moesaic.moe.router_gate import RouterShape, RouterStateWidths


@dataclass(frozen=True, slots=True)
class BlockRange:
    """The blocks of each stack that a pipeline stage runs."""

    encoder: range
    decoder: range

    @staticmethod
    def all_blocks(config: ModelConfig) -> "BlockRange":
        """Return the range of all blocks."""
        return BlockRange(range(config.encoder.layers), range(config.decoder.layers))

    @staticmethod
    def between(start: int, stop: int, *, config: ModelConfig) -> "BlockRange":
        """Return the blocks ``start`` to ``stop`` (not included) of the chain."""
        first = config.encoder.layers
        encoder = range(min(start, first), min(stop, first))
        return BlockRange(encoder, range(max(start - first, 0), max(stop - first, 0)))

    def holds(self, name: str) -> bool:
        """Whether a parameter, or a module whose name ends with a dot, is in one of the blocks."""
        stack, number, *_ = (*name.split("."), "")
        blocks = {"encoder": self.encoder, "decoder": self.decoder}.get(stack, range(0))
        return number.isdigit() and int(number) in blocks


@dataclass(frozen=True, slots=True)
class StageIO:
    """What a pipeline stage sends to the next one, for the tokens of this rank.

    ``x`` are the states of the stack in progress (None where the next stage enters a stack), with
    its routers' state; ``encoder_states`` the encoder's output, once all of its blocks have run.
    """

    x: Float[Tensor, "T D"] | None = None
    router_hidden: Float[Tensor, "T P"] | None = None
    router_logits: Float[Tensor, "T E"] | None = None
    encoder_states: Float[Tensor, "S D"] | None = None


@dataclass(frozen=True, slots=True)
class PartialForward:
    """The result of a stage: the last block's output and context, and what the encoder returned.

    ``state`` and ``context`` are None between the encoder and the decoder.
    """

    state: BlockState | None = None
    context: ForwardContext | None = None
    encoder_output: EncoderOutput | None = None
    encoder_records: Records = ()

    @property
    def records(self) -> Records:
        """The routing records of the stage."""
        return self.encoder_records + (self.state.records if self.state else ())

    @property
    def stage_output(self) -> StageIO:
        """What the next stage needs."""
        encoder_states = self.encoder_output.states if self.encoder_output else None
        if self.state is None:
            return StageIO(encoder_states=encoder_states)
        router = self.state.router_state
        return StageIO(self.state.x, router.hidden, router.logits, encoder_states)


def forward_blocks(
    model: Transformer, batch: Batch, *, blocks: BlockRange, stage_input: StageIO | None = None
) -> PartialForward:
    """Run a range of a model's blocks on a batch, from the output of the stage before."""
    given = stage_input or StageIO()
    encoder_output, records = None, ()
    if blocks.encoder:
        tokens = model.encoder_tokens(batch.source, row_key=batch.key)
        context, state = _enter_stack(model, tokens, given=given)
        for index in blocks.encoder:
            state = model.run_block(model.encoder[index], state, context=context)
        if blocks.encoder.stop < len(model.encoder):
            return PartialForward(state, context)
        encoder_output = EncoderOutput(model.encoder_norm(state.x), tokens.packing)
        records, given = state.records, StageIO()
    elif given.encoder_states is not None:
        packing = model.sequence_sharding(packing_of(batch.source))
        encoder_output = EncoderOutput(given.encoder_states, packing)
    if not blocks.decoder:
        return PartialForward(encoder_output=encoder_output, encoder_records=records)
    tokens = model.decoder_tokens(batch)
    context, state = _enter_stack(model, tokens, given=given)
    if given.x is None and encoder_output is not None:
        # otherwise decoder blocks that do not read the source would send it no gradient
        state = replace(state, x=connect_graph(state.x, encoder_output.states))
    for index in blocks.decoder:
        state = model.run_block(
            model.decoder[index], state, context=context, encoder_output=encoder_output
        )
    return PartialForward(state, context, encoder_output, records)


def output_of(model: Transformer, end: PartialForward, *, batch: Batch) -> ModelOutput:
    """Return the model's output, given the result of the last stage."""
    if end.state is None or end.context is None:
        raise TypeError("only the last stage, which ends with the decoder, has an output")
    return model.output(
        end.state,
        batch=batch,
        packing=end.context.packing,
        encoder_records=end.encoder_records,
    )


def router_state_widths(config: ModelConfig, stack: Stack) -> RouterStateWidths:
    """Return the widths of the router state that a stack's MoE layers pass on."""
    moe = config.moe_of_stack(stack)
    if not isinstance(moe, MoE) or not stack.moe_layers:
        return RouterStateWidths()
    first = config.routed_moe_of_layer(stack, layer=stack.moe_layers[0]) or moe
    return moe.cross_layer.state_widths(RouterShape(config.dim, first.num_router_outputs))


def attach_loss(x: Float[Tensor, "*S"], loss: Float[Tensor, ""]) -> Float[Tensor, "*S"]:
    """Return ``x`` with ``loss`` in its autograd graph: backward adds 1 to the loss's gradient."""
    return _AttachLoss.apply(x, loss)


def connect_graph(x: Float[Tensor, "T D"], other: Float[Tensor, "*S"]) -> Float[Tensor, "T D"]:
    """Return ``x`` with ``other`` in its autograd graph, with a zero gradient."""
    return _AttachLoss.apply(x, 0.0 * other.sum())


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device)


def _enter_stack(
    model: Transformer, tokens: StackTokens, *, given: StageIO
) -> tuple[ForwardContext, BlockState]:
    """Return a stack's context, and its state: the embeddings, or what the stage before sent."""
    context = model.forward_context(tokens)
    if given.x is None:
        return context, model.embed(tokens, context=context)
    shared = model.shared_router(tokens.stack)
    return context, BlockState(
        given.x, RouterState(given.router_hidden, given.router_logits, shared)
    )
