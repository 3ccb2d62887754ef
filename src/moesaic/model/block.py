"""Transformer blocks: residual branches of sequence mixers and of a feed-forward, dense or MoE.

Letters: B rows, S source length, T tokens, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from torch import nn

from moesaic.core.shapes import Bool, Float, Tensor
from moesaic.model.config import ModelConfig
from moesaic.model.kv_cache import EncoderOutput
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.cross_attention import CrossAttention
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.fused_projections import gate_and_value
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import FeedForwardShape
from moesaic.nn.sequence_mixer import MixerContext, SequenceMixer
from moesaic.nn.shardable_module import (
    ContextScope,
    ContextSharding,
    ShardableModule,
    TensorSharding,
    column_parallel,
    row_parallel,
)
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

    ``mixing`` is what sequence mixers read, ``routing_context`` what routers may read of
    ``packing.local_tokens``.
    """

    mixing: MixerContext
    routing_context: TokenContext

    @property
    def packing(self) -> Packing:
        return self.mixing.packing


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
        norm = config.block_layout.branch_norm(config.norm, dim=config.dim)
        self.norm = config.activation_coding.after(norm)
        self.inner = inner
        self.dropout = Dropout(config.dropout, name=name)
        self.multiplier = config.block_layout.residual_multiplier

    def add(
        self, x: Float[Tensor, "T D"], y: Float[Tensor, "T D"], *, context: ForwardContext
    ) -> Float[Tensor, "T D"]:
        """Return the residual stream ``x`` with this branch's output."""
        scaled = y if self.multiplier == 1 else self.multiplier * y
        return x + self.dropout(scaled, context=context.routing_context)


class MixerBranch(ResidualBranch):
    """``x + mixer(norm(branch_input))``: attention, or another sequence mixer."""

    def __init__(self, config: ModelConfig, mixer: SequenceMixer, *, side: str, name: str) -> None:
        super().__init__(config, mixer.build(config.mixer_shape(side)), name=name)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        branch_input: Float[Tensor, "T D"],
        context: ForwardContext,
        state: DecodeState | None = None,
    ) -> Float[Tensor, "T D"]:
        y = self.inner(self.norm(branch_input), context=context.mixing, state=state)
        return self.add(x, y, context=context)


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
        return self.add(x, y, context=context)


class FeedForwardBranch(ResidualBranch, ShardableModule):
    """``x + feed_forward(norm(branch_input))`` with a dense feed-forward."""

    def __init__(self, config: ModelConfig, *, name: str) -> None:
        dense = DenseFeedForward(config.feed_forward, dim=config.dim, bias=config.bias)
        super().__init__(config, dense, name=name)
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def tensor_sharding(self) -> TensorSharding:
        up, down = self.inner.up, self.inner.down
        segments = gate_and_value(up.out_features, hidden=down.in_features)
        return TensorSharding(
            column_parallel("inner.up", up, segments=segments) | row_parallel("inner.down", down),
            divided={"hidden channels": down.in_features},
            row_parallel=("inner.down",),
        )

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        del ranks
        self.tensor_parallel = group

    def context_sharding(self) -> ContextSharding:
        return ContextSharding()

    def use_context_parallel(self, scope: ContextScope) -> None:
        """Do nothing: each token is computed by itself."""

    def forward(
        self, state: BlockState, *, branch_input: Float[Tensor, "T D"], context: ForwardContext
    ) -> BlockState:
        packing, group = context.packing, self.tensor_parallel
        gathered = group.all_gather_tokens(self.norm(branch_input), packing)
        y = group.reduce_scatter_tokens(self.inner(gathered), packing)
        return replace(state, x=self.add(state.x, y, context=context))


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
        x = self.add(state.x, output.out, context=context)
        return BlockState(x, output.router_state, records)


class Block(nn.Module):
    """Base of blocks: a residual branch for each mixer of the block's pattern, in order.

    A branch is called as its mixer's kind (``SequenceMixer.branch``); a second one of the same name
    has ``_2`` behind it.
    """

    feed_forward: FeedForwardBranch | MoEBranch | None

    def __init__(self, config: ModelConfig, *, side: str, layer: int) -> None:
        super().__init__()
        self.layout = config.block_layout
        self.input_norm = self.layout.input_norm(config.norm, dim=config.dim)
        mixers = config.mixers_of_layer(config.stack_of(side), layer=layer)
        self.mixer_names = _branch_names(mixers)
        for branch, mixer in zip(self.mixer_names, mixers, strict=True):
            name = f"{side}.{layer} {branch.removeprefix('self_')}"
            self.add_module(branch, MixerBranch(config, mixer, side=side, name=name))

    @property
    def mixer_branches(self) -> list[MixerBranch]:
        """The branches that mix tokens, in order."""
        return [getattr(self, name) for name in self.mixer_names]

    def _mix_tokens(
        self,
        x: Float[Tensor, "T D"],
        *,
        normed_input: Float[Tensor, "T D"],
        context: ForwardContext,
        states: Sequence[DecodeState] = (),
    ) -> Float[Tensor, "T D"]:
        for branch, state in zip_longest(self.mixer_branches, states):
            branch_input = self.layout.branch_input(x, normed_input=normed_input)
            x = branch(x, branch_input=branch_input, context=context, state=state)
        return x

    def _feed_forward(
        self, state: BlockState, *, normed_input: Float[Tensor, "T D"], context: ForwardContext
    ) -> BlockState:
        if self.feed_forward is None:
            return state
        branch_input = self.layout.branch_input(state.x, normed_input=normed_input)
        return self.feed_forward(state, branch_input=branch_input, context=context)


def _branch_names(mixers: Sequence[SequenceMixer]) -> tuple[str, ...]:
    kinds = [mixer.branch for mixer in mixers]
    numbers = [kinds[:place].count(kind) + 1 for place, kind in enumerate(kinds)]
    return tuple(k if n == 1 else f"{k}_{n}" for k, n in zip(kinds, numbers, strict=True))


class EncoderBlock(Block):
    """Sequence mixers, feed-forward."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__(config, side="encoder", layer=layer)
        self.feed_forward = build_feed_forward_branch(config, side="encoder", layer=layer)

    def forward(self, state: BlockState, *, context: ForwardContext) -> BlockState:
        normed = self.input_norm(state.x)
        x = self._mix_tokens(state.x, normed_input=normed, context=context)
        return self._feed_forward(replace(state, x=x), normed_input=normed, context=context)


class DecoderBlock(Block):
    """Causal sequence mixers, cross-attention if there is an encoder, feed-forward."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__(config, side="decoder", layer=layer)
        cross = (
            CrossAttentionBranch(config, name=f"decoder.{layer} source")
            if config.encoder.layers
            else None
        )
        self.cross_attention = cross
        self.feed_forward = build_feed_forward_branch(config, side="decoder", layer=layer)

    def project_source(self, encoder_output: EncoderOutput | None) -> KeyValue | None:
        """Return the cross-attention's keys and values of the source; None without an encoder."""
        if self.cross_attention is None or encoder_output is None:
            return None
        return self.cross_attention.inner.project_source(
            encoder_output.states, packing=encoder_output.packing
        )

    def init_states(self, rows: int, *, like: Tensor) -> list[DecodeState]:
        """Return the decode state of each mixer, for so many rows without tokens."""
        return [branch.inner.init_state(rows, like=like) for branch in self.mixer_branches]

    def forward(
        self, state: BlockState, *, context: ForwardContext, encoder_output: EncoderOutput | None
    ) -> BlockState:
        normed = self.input_norm(state.x)
        x = self._mix_tokens(state.x, normed_input=normed, context=context)
        keys = self.project_source(encoder_output)
        mask = encoder_output.packing.key_mask if encoder_output else None
        x = self._read_source(x, normed_input=normed, context=context, source=keys, mask=mask)
        return self._feed_forward(replace(state, x=x), normed_input=normed, context=context)

    def step(
        self,
        state: BlockState,
        *,
        context: ForwardContext,
        states: Sequence[DecodeState],
        source: KeyValue | None,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> BlockState:
        """Compute the block for the newest tokens; ``states`` are those of its mixers."""
        normed = self.input_norm(state.x)
        x = self._mix_tokens(state.x, normed_input=normed, context=context, states=states)
        x = self._read_source(x, normed_input=normed, context=context, source=source, mask=mask)
        return self._feed_forward(replace(state, x=x), normed_input=normed, context=context)

    def _read_source(
        self,
        x: Float[Tensor, "T D"],
        *,
        normed_input: Float[Tensor, "T D"],
        context: ForwardContext,
        source: KeyValue | None,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        if self.cross_attention is None or source is None:
            return x
        branch_input = self.layout.branch_input(x, normed_input=normed_input)
        return self.cross_attention(
            x, branch_input=branch_input, context=context, source=source, mask=mask
        )


def build_feed_forward_branch(
    config: ModelConfig, *, side: str, layer: int
) -> FeedForwardBranch | MoEBranch | None:
    """Build a block's last branch: dense, sparse where the stack has an MoE layer, or none."""
    stack = config.stack_of(side)
    if not stack.block_pattern(layer).feed_forward:
        return None
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
