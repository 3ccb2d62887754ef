"""Transformer blocks: residual branches of attention and of a feed-forward, dense or MoE.

Letters: B rows, S source length, T tokens, D model dim, n new tokens.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.kv_cache import EncoderOutput
from moesaic.moe.attention_experts import SelfAttentionModule
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.attention import CrossAttention
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import FeedForwardShape
from moesaic.nn.positional_encoding import Rotation
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup
from moesaic.ops.counter_rng import dropout


class Dropout(nn.Module):
    """Dropout whose mask is a function of the token, the layer's ``name`` and the row's random key.

    The mask is the same whichever rank holds the token, however the batch is split, in recomputed
    passes, and after resuming on another number of ranks; torch's own dropout draws from the
    generator of the rank. Names are unique within a model.
    """

    def __init__(self, rate: float, *, name: str) -> None:
        super().__init__()
        self.rate, self.name = rate, name

    def forward(self, x: Float[Tensor, "T D"], *, context: TokenContext) -> Float[Tensor, "T D"]:
        if not self.training or not self.rate:
            return x
        return dropout(x, key=context.random_key(self.name), rate=self.rate)


Records = tuple[RoutingRecord, ...]


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What every block of a stack needs of one batch beside the hidden states.

    ``rotation`` turns queries and keys of ``packing.gathered_tokens``; ``routing_context`` is what
    routers may read of ``packing.local_tokens``.
    """

    packing: Packing
    rotation: Rotation
    routing_context: TokenContext


@dataclass(frozen=True, slots=True)
class BlockState:
    """A block's output: hidden states, router state for the next MoE layer, routing records."""

    x: Float[Tensor, "T D"]
    router_state: RouterState
    records: Records = ()


class ResidualBranch(nn.Module):
    """Base of branches: ``x + dropout(inner(norm(branch_input)))``."""

    def __init__(self, config: ModelConfig, inner: Any, *, name: str) -> None:
        super().__init__()
        self.norm = config.block_layout.branch_norm(config.norm, dim=config.dim)
        self.inner = inner
        self.dropout = Dropout(config.dropout, name=name)


class SelfAttentionBranch(ResidualBranch):
    """``x + self_attention(norm(branch_input))``."""

    def __init__(self, config: ModelConfig, *, causal: bool, name: str) -> None:
        attention: SelfAttentionModule = config.attention_experts.build(
            config.attention, dim=config.dim, bias=config.bias
        )
        super().__init__(config, attention, name=name)
        self.causal = causal

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        branch_input: Float[Tensor, "T D"],
        context: ForwardContext,
    ) -> Float[Tensor, "T D"]:
        y = self.inner(
            self.norm(branch_input),
            packing=context.packing,
            rotation=context.rotation,
            causal=self.causal,
        )
        return x + self.dropout(y, context=context.routing_context)

    def step(
        self,
        x: Float[Tensor, "T D"],
        *,
        branch_input: Float[Tensor, "T D"],
        context: ForwardContext,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T D"]:
        """Compute the branch for the newest tokens; ``cache`` holds the keys of earlier ones."""
        return x + self.inner.step(
            self.norm(branch_input),
            packing=context.packing,
            rotation=context.rotation,
            cache=cache,
            position=position,
        )


class CrossAttentionBranch(ResidualBranch):
    """``x + cross_attention(norm(branch_input), source)``."""

    def __init__(self, config: ModelConfig, *, name: str) -> None:
        attention = CrossAttention(config.attention, dim=config.dim, bias=config.bias)
        super().__init__(config, attention, name=name)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        branch_input: Float[Tensor, "T D"],
        context: ForwardContext,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        y = self.inner(self.norm(branch_input), packing=context.packing, source=source, mask=mask)
        return x + self.dropout(y, context=context.routing_context)


class FeedForwardBranch(ResidualBranch):
    """``x + feed_forward(norm(branch_input))`` with a dense feed-forward."""

    def __init__(self, config: ModelConfig, *, name: str) -> None:
        dense = DenseFeedForward(config.feed_forward, dim=config.dim, bias=config.bias)
        super().__init__(config, dense, name=name)
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def forward(
        self, state: BlockState, *, branch_input: Float[Tensor, "T D"], context: ForwardContext
    ) -> BlockState:
        packing, group = context.packing, self.tensor_parallel
        gathered = group.all_gather_tokens(self.norm(branch_input), packing)
        y = group.reduce_scatter_tokens(self.inner(gathered), packing)
        return replace(state, x=state.x + self.dropout(y, context=context.routing_context))


class MoEBranch(ResidualBranch):
    """``x + moe(norm(branch_input))``; appends a routing record if the layer has a router."""

    def forward(
        self, state: BlockState, *, branch_input: Float[Tensor, "T D"], context: ForwardContext
    ) -> BlockState:
        output = self.inner(
            self.norm(branch_input),
            context=context.routing_context,
            router_state=state.router_state,
        )
        records = state.records if output.record is None else (*state.records, output.record)
        x = state.x + self.dropout(output.out, context=context.routing_context)
        return BlockState(x, output.router_state, records)


class EncoderBlock(nn.Module):
    """Self-attention, feed-forward."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.input_norm = config.block_layout.input_norm(config.norm, dim=config.dim)
        name = f"encoder.{layer} attention"
        self.self_attention = SelfAttentionBranch(config, causal=False, name=name)
        self.feed_forward = build_feed_forward_branch(
            config, stack=config.encoder, layer=layer, side="encoder"
        )
        self.layout = config.block_layout

    def forward(self, state: BlockState, *, context: ForwardContext) -> BlockState:
        branch_input = partial(self.layout.branch_input, normed_input=self.input_norm(state.x))
        x = self.self_attention(state.x, branch_input=branch_input(state.x), context=context)
        return self.feed_forward(replace(state, x=x), branch_input=branch_input(x), context=context)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention if there is an encoder, feed-forward."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.input_norm = config.block_layout.input_norm(config.norm, dim=config.dim)
        name = f"decoder.{layer} attention"
        self.self_attention = SelfAttentionBranch(config, causal=True, name=name)
        cross = (
            CrossAttentionBranch(config, name=f"decoder.{layer} source")
            if config.encoder.layers
            else None
        )
        self.cross_attention = cross
        self.feed_forward = build_feed_forward_branch(
            config, stack=config.decoder, layer=layer, side="decoder"
        )
        self.layout = config.block_layout

    def project_source(self, encoder_output: EncoderOutput | None) -> KeyValue | None:
        """Return the cross-attention's keys and values of the source; None without an encoder."""
        if self.cross_attention is None or encoder_output is None:
            return None
        return self.cross_attention.inner.project_source(
            encoder_output.states, packing=encoder_output.packing
        )

    def forward(
        self, state: BlockState, *, context: ForwardContext, encoder_output: EncoderOutput | None
    ) -> BlockState:
        normed = self.input_norm(state.x)
        branch_input = self.layout.branch_input(state.x, normed_input=normed)
        x = self.self_attention(state.x, branch_input=branch_input, context=context)
        return self._cross_attention_and_feed_forward(
            replace(state, x=x),
            normed_input=normed,
            context=context,
            source=self.project_source(encoder_output),
            mask=encoder_output.packing.key_mask if encoder_output else None,
        )

    def step(
        self,
        state: BlockState,
        *,
        context: ForwardContext,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
        source: KeyValue | None,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> BlockState:
        """Compute the block for the newest tokens; ``cache`` holds the keys of earlier ones."""
        normed = self.input_norm(state.x)
        x = self.self_attention.step(
            state.x,
            branch_input=self.layout.branch_input(state.x, normed_input=normed),
            context=context,
            cache=cache,
            position=position,
        )
        return self._cross_attention_and_feed_forward(
            replace(state, x=x), normed_input=normed, context=context, source=source, mask=mask
        )

    def _cross_attention_and_feed_forward(
        self,
        state: BlockState,
        *,
        normed_input: Float[Tensor, "T D"],
        context: ForwardContext,
        source: KeyValue | None,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> BlockState:
        branch_input = partial(self.layout.branch_input, normed_input=normed_input)
        x = state.x
        if self.cross_attention is not None and source is not None:
            x = self.cross_attention(
                x, branch_input=branch_input(x), context=context, source=source, mask=mask
            )
        return self.feed_forward(replace(state, x=x), branch_input=branch_input(x), context=context)


def build_feed_forward_branch(
    config: ModelConfig, *, stack: Stack, layer: int, side: str
) -> FeedForwardBranch | MoEBranch:
    """Build a block's last branch: dense, or sparse where the stack's config has an MoE layer."""
    sparse, layers = config.moe_of_layer(stack, layer=layer), stack.moe_layers
    name = f"{side}.{layer} feed-forward"
    if isinstance(sparse, NoMoE):
        return FeedForwardBranch(config, name=name)
    dim, dense, bias = config.dim, config.feed_forward, config.bias
    if not isinstance(sparse, MoE):
        return MoEBranch(config, sparse.build(FeedForwardShape(dim, dense, bias)), name=name)
    index = LayerIndex(f"{side}.{layer}", index=layers.index(layer), count=len(layers))
    moe = MoELayer(sparse, dim=dim, feed_forward=dense, bias=bias, layer_index=index)
    return MoEBranch(config, moe, name=name)
