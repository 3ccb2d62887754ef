"""Multi-head self-attention, a sequence mixer, and cross-attention.

``backend`` computes attention (context parallelism replaces it), ``tensor_parallel`` is the group
of ranks that share the matrices.

Letters: B rows, S source length, T tokens, D model dim, H heads, G key/value heads, d head dim.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Self

from pydantic import Field
from torch import nn

from moesaic.core.shapes import Bool, Float, Tensor
from moesaic.nn.attention_backend import (
    AttentionBackend,
    KeyValue,
    LocalAttention,
    QueryKeyValue,
    attend,
    pad_heads,
)
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.decode_state import DecodeState, KVState
from moesaic.nn.fused_projections import FusedProjections
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec, linear_specs
from moesaic.nn.positional_encoding import PositionalEncoding
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule
from moesaic.nn.shardable_module import (
    ContextScope,
    ContextSharding,
    ShardableModule,
    TensorSharding,
    column_parallel,
    row_parallel,
)
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup


class Attention(SequenceMixer):
    """Softmax attention (1706.03762). What is None here is as in the model's ``attention``.

    ``position`` rotates queries and keys; None: the model's.
    """

    heads: int | None = Field(default=None, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    position: PositionalEncoding | None = None

    branch = "self_attention"

    def config(self, shape: MixerShape) -> AttentionConfig:
        """Return the config of this attention in such a model."""
        own = {name: getattr(self, name) for name in AttentionConfig.model_fields}
        given = {name: value for name, value in own.items() if value is not None}
        return shape.attention.replace(**given) if given else shape.attention

    def encoding(self, shape: MixerShape) -> PositionalEncoding:
        """Return what rotates queries and keys."""
        return self.position or shape.position

    def build(self, shape: MixerShape, /) -> SequenceMixerModule:
        own = replace(shape, attention=self.config(shape), position=self.encoding(shape))
        return SelfAttention(own)

    def problems(self, shape: MixerShape, /) -> str | None:
        return self.config(shape).problems(shape.dim, position=self.encoding(shape))

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        query, keys = self.config(shape).widths(shape.dim)
        return [
            *linear_specs(shape.dim, query + 2 * keys, bias=shape.bias),
            *linear_specs(query, shape.dim, bias=shape.bias),
        ]

    def saved_activations(self, shape: MixerShape, /) -> int:
        config = self.config(shape)
        query, keys = config.widths(shape.dim)
        turned = self.encoding(shape).rotated_channels(config.head_width(shape.dim))
        rotated = query + keys if turned else 0
        return query + 2 * keys + rotated + query + config.heads

    def shared_activations(self, shape: MixerShape, /) -> Mapping[Hashable, int]:
        encoding, width = self.encoding(shape), self.config(shape).head_width(shape.dim)
        return {("rotation", encoding, width): encoding.rotated_channels(width)}

    def mixing_flops(self, shape: MixerShape, /, *, tokens: int) -> float:
        query, _ = self.config(shape).widths(shape.dim)
        pairs = tokens * (tokens + 1) / 2 if shape.causal else tokens**2
        return 4.0 * query * pairs

    def exchanged_values(
        self, shape: MixerShape, /, *, tokens: int, ranks: int, tensor: int
    ) -> float:
        return self.config(shape).exchanged_values(
            shape.dim, queries=tokens, keys=tokens, ranks=ranks, tensor=tensor
        )

    def shrink(self, shape: MixerShape, /) -> Self:
        width = self.head_dim and min(self.head_dim, shape.attention.head_width(shape.dim))
        return self.replace(head_dim=width)


class SelfAttention(SequenceMixerModule, FusedProjections):
    """Self-attention with the heads of ``shape.attention``; q, k and v are one projection."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        config, dim, bias = shape.attention, shape.dim, shape.bias
        self.heads, self.kv_heads, self.head_dim = (
            config.heads,
            config.num_kv_heads(),
            config.head_width(dim),
        )
        self.position = shape.position
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(self.heads * self.head_dim, dim, bias=bias)
        self.backend: AttentionBackend = LocalAttention()
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"qkv.weight": (query, keys, keys)}

    def tensor_sharding(self) -> TensorSharding:
        segments = self.fused_outputs()["qkv.weight"]
        return TensorSharding(
            column_parallel("qkv", self.qkv, segments=segments) | row_parallel("out", self.out),
            divided={"heads": self.heads, "kv_heads": self.kv_heads},
            row_parallel=("out",),
        )

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        self.heads, self.kv_heads = self.heads // ranks, self.kv_heads // ranks
        self.tensor_parallel = group

    def context_sharding(self) -> ContextSharding:
        return ContextSharding(heads=self.heads)

    def use_context_parallel(self, scope: ContextScope) -> None:
        self.backend = scope.attention_backend(kv_heads=self.kv_heads)

    def init_state(self, rows: int, *, like: Tensor) -> KVState:
        return KVState.empty(rows, kv_heads=self.kv_heads, head_dim=self.head_dim, like=like)

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        """Attend within each row, in a causal stack to a token itself and to those before it."""
        x = self.tensor_parallel.all_gather_tokens(x, context.packing)
        heads = self.attend_heads(x, context=context, state=state)
        return self.tensor_parallel.reduce_scatter_tokens(self.out(heads), context.packing)

    def attend_heads(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T HD"]:
        """Return the concatenated heads, before the output projection."""
        heads, packing = self._project(x, context=context), context.packing
        if not isinstance(state, KVState):
            return self.backend.self_attention(heads, packing=packing, causal=context.causal)
        slots, sources = context.decode_slots, context.decode_slots.sources
        query, key, value = (pad_heads(each, packing, sources=sources) for each in heads)
        keys = state.append(key, value)
        if slots.is_first:
            return self.backend.self_attention(heads, packing=packing, causal=context.causal)
        return packing.pack(attend(query, keys, mask=slots.allowed(), causal=False))

    def _project(self, x: Float[Tensor, "T D"], *, context: MixerContext) -> QueryKeyValue:
        heads, groups = self.heads, self.kv_heads
        both, value = (
            self.qkv(x).unflatten(-1, (-1, self.head_dim)).split([heads + groups, groups], 1)
        )
        rotate = context.rotation(self.position, head_dim=self.head_dim)
        query, key = rotate(both).split([heads, groups], 1)
        return QueryKeyValue(query, key, value)


class CrossAttention(ShardableModule, FusedProjections):
    """Attention from target tokens to the encoder's states, without positions."""

    def __init__(self, config: AttentionConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.heads,
            config.num_kv_heads(),
            config.head_width(dim),
        )
        self.query = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * self.kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(self.heads * self.head_dim, dim, bias=bias)
        self.backend: AttentionBackend = LocalAttention()
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        keys = self.kv_heads * self.head_dim
        return {"kv.weight": (keys, keys)}

    def tensor_sharding(self) -> TensorSharding:
        return TensorSharding(
            column_parallel("query", self.query, segments=(self.heads * self.head_dim,))
            | column_parallel("kv", self.kv, segments=self.fused_outputs()["kv.weight"])
            | row_parallel("out", self.out),
            divided={"heads": self.heads, "kv_heads": self.kv_heads},
            row_parallel=("out",),
        )

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        self.heads, self.kv_heads = self.heads // ranks, self.kv_heads // ranks
        self.tensor_parallel = group

    def context_sharding(self) -> ContextSharding:
        return ContextSharding(heads=self.heads)

    def use_context_parallel(self, scope: ContextScope) -> None:
        self.backend = scope.attention_backend(kv_heads=self.kv_heads)

    def project_source(self, encoder_states: Float[Tensor, "T D"], *, packing: Packing) -> KeyValue:
        """Return keys and values of the source, once per layer and batch."""
        both = self.kv(self.tensor_parallel.all_gather_tokens(encoder_states, packing)).unflatten(
            -1, (-1, self.head_dim)
        )
        return self.backend.project_source(*both.split(self.kv_heads, 1), packing=packing)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        source: KeyValue,
        mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "T D"]:
        """Attend to ``source`` where ``mask`` is true (None: everywhere)."""
        x = self.tensor_parallel.all_gather_tokens(x, packing)
        query = self.query(x).unflatten(-1, (-1, self.head_dim))
        heads = self.backend.cross_attention(query, packing=packing, source=source, mask=mask)
        return self.tensor_parallel.reduce_scatter_tokens(self.out(heads), packing)
