"""Block: attention and a feed-forward (dense or sparse), each adding to the stream.

What a branch reads of the stream is the arrangement's affair (``arrangement.py``).

Letters: B rows, L length, T tokens, D model dim.

Dropout: what is dropped is a function of the token, the layer and the run's draw of its row.

So it is the same whichever rank holds the token, however the batch is cut, in a pass that is
repeated, and after resuming on another number of ranks. torch's own draws from the rank's stream.
"""

from dataclasses import dataclass, replace

from torch import nn

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.kv_cache import EncoderOutput
from moesaic.moe.attention_experts import SelfAttentionModule
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_logits import LayerIndex
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.attention import CrossAttention
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.feed_forward import DenseFeedForward
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import Rotation
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup
from moesaic.ops.counter_rng import dropout


class Dropout(nn.Module):
    """Sets channels to zero with probability ``rate`` in training.

    No two of a model have one ``name``.
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
    """How the tokens of one pass see each other: where they are and how positions turn them.

    ``rotation`` is that of the tokens that meet in a matrix (``packing.met``); ``context`` is what
    routers may know of the tokens held here.
    """

    packing: Packing
    rotation: Rotation
    routing_context: TokenContext


@dataclass(frozen=True, slots=True)
class BlockState:
    """The states between two blocks, and what the MoE layers of the stack hand on."""

    x: Float[Tensor, "T D"]
    router_state: RouterState
    records: Records = ()


@dataclass(frozen=True, slots=True)
class CrossAttentionInputs:
    """What a decoder block's later branches need: how it was entered, and the source."""

    block_input: Float[Tensor, "T D"]
    source: KeyValue | None
    mask: Bool[Tensor, "B 1 1 S"] | None


class SelfAttentionBranch(nn.Module):
    """``x + attention(norm(read))``."""

    def __init__(self, config: ModelConfig, *, causal: bool, name: str) -> None:
        super().__init__()
        self.norm = config.block_layout.branch_norm(config.norm, dim=config.dim)
        self.inner: SelfAttentionModule = config.attention_experts.build(
            config.attention, dim=config.dim, bias=config.bias
        )
        self.dropout = Dropout(config.dropout, name=name)
        self.causal = causal

    def forward(
        self, x: Float[Tensor, "T D"], *, read: Float[Tensor, "T D"], view: ForwardContext
    ) -> Float[Tensor, "T D"]:
        y = self.inner(
            self.norm(read), packing=view.packing, rotation=view.rotation, causal=self.causal
        )
        return x + self.dropout(y, context=view.routing_context)

    def step(
        self,
        x: Float[Tensor, "T D"],
        *,
        read: Float[Tensor, "T D"],
        view: ForwardContext,
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


class CrossAttentionBranch(nn.Module):
    """``x + attention(norm(read), source)``."""

    def __init__(self, config: ModelConfig, *, name: str) -> None:
        super().__init__()
        self.norm = config.block_layout.branch_norm(config.norm, dim=config.dim)
        self.inner = CrossAttention(config.attention, dim=config.dim, bias=config.bias)
        self.dropout = Dropout(config.dropout, name=name)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        read: Float[Tensor, "T D"],
        view: ForwardContext,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        y = self.inner(self.norm(read), packing=view.packing, source=source, mask=mask)
        return x + self.dropout(y, context=view.routing_context)


class FeedForwardBranch(nn.Module):
    """``x + feed_forward(norm(read))``; nothing is recorded or handed on."""

    def __init__(self, config: ModelConfig, *, name: str) -> None:
        super().__init__()
        self.norm = config.block_layout.branch_norm(config.norm, dim=config.dim)
        self.inner = DenseFeedForward(config.feed_forward, dim=config.dim, bias=config.bias)
        self.dropout = Dropout(config.dropout, name=name)
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def forward(
        self, stream: BlockState, *, read: Float[Tensor, "T D"], view: ForwardContext
    ) -> BlockState:
        met = self.tensor_parallel.all_gather_tokens(self.norm(read), packing=view.packing)
        y = self.tensor_parallel.reduce_scatter_tokens(self.inner(met), packing=view.packing)
        return replace(stream, x=stream.x + self.dropout(y, context=view.routing_context))


class MoEBranch(nn.Module):
    """``x + experts(norm(read))``, and a record if there is a router."""

    def __init__(self, config: ModelConfig, *, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.norm = config.block_layout.branch_norm(config.norm, dim=config.dim)
        self.inner = inner
        self.dropout = Dropout(config.dropout, name=name)

    def forward(
        self, stream: BlockState, *, read: Float[Tensor, "T D"], view: ForwardContext
    ) -> BlockState:
        answer = self.inner(
            self.norm(read), context=view.routing_context, router_state=stream.router_state
        )
        records = stream.records if answer.record is None else (*stream.records, answer.record)
        x = stream.x + self.dropout(answer.out, context=view.routing_context)
        return BlockState(x, answer.router_state, records)


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

    def forward(self, stream: BlockState, *, view: ForwardContext) -> BlockState:
        entered, reads = self.input_norm(stream.x), self.layout.branch_input
        x = self.self_attention(stream.x, read=reads(stream.x, block_input=entered), view=view)
        read = reads(x, block_input=entered)
        return self.feed_forward(replace(stream, x=x), read=read, view=view)


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

    def project_source(self, memory: Float[Tensor, "T D"], *, packing: Packing) -> KeyValue | None:
        """Keys and values of the source, if this block looks at one."""
        if self.cross_attention is None:
            return None
        return self.cross_attention.inner.project_source(memory, packing=packing)

    def forward(
        self,
        stream: BlockState,
        *,
        view: ForwardContext,
        memory: EncoderOutput,
    ) -> BlockState:
        entered = self.input_norm(stream.x)
        read = self.layout.branch_input(stream.x, block_input=entered)
        x = self.self_attention(stream.x, read=read, view=view)
        source = self.project_source(memory.states, packing=memory.packing)
        look = CrossAttentionInputs(entered, source, memory.packing.key_mask)
        return self._cross_attention_and_feed_forward(replace(stream, x=x), view=view, look=look)

    def step(
        self,
        stream: BlockState,
        *,
        view: ForwardContext,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
        source: KeyValue | None,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> BlockState:
        """The same for the newest tokens, with what came before in ``cache``."""
        entered = self.input_norm(stream.x)
        read = self.layout.branch_input(stream.x, block_input=entered)
        x = self.self_attention.step(stream.x, read=read, view=view, cache=cache, position=position)
        look = CrossAttentionInputs(entered, source, mask)
        return self._cross_attention_and_feed_forward(replace(stream, x=x), view=view, look=look)

    def _cross_attention_and_feed_forward(
        self, stream: BlockState, *, view: ForwardContext, look: CrossAttentionInputs
    ) -> BlockState:
        reads = self.layout.branch_input
        if self.cross_attention is not None and look.source is not None:
            read = reads(stream.x, block_input=look.block_input)
            x = self.cross_attention(
                stream.x, read=read, view=view, source=look.source, mask=look.mask
            )
            stream = replace(stream, x=x)
        read = reads(stream.x, block_input=look.block_input)
        return self.feed_forward(stream, read=read, view=view)


def build_feed_forward_branch(
    config: ModelConfig, *, stack: Stack, layer: int, side: str
) -> FeedForwardBranch | MoEBranch:
    """Make a block's last branch: dense, or sparse where the stack says so."""
    sparse, layers = config.moe_of_layer(stack, layer=layer), stack.moe_layers
    name = f"{side}.{layer} feed-forward"
    if isinstance(sparse, NoMoE):
        return FeedForwardBranch(config, name=name)
    dim, feed, bias = config.dim, config.feed_forward, config.bias
    if not isinstance(sparse, MoE):
        own = sparse.build(feed_forward=feed, dim=dim, bias=bias)
        return MoEBranch(config, inner=own, name=name)
    place = LayerIndex(f"{side}.{layer}", index=layers.index(layer), count=len(layers))
    experts = MoELayer(sparse, dim=dim, feed_forward=feed, bias=bias, layer_index=place)
    return MoEBranch(config, inner=experts, name=name)
