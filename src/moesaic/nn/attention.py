"""Multi-head self-attention, a sequence mixer.

``backend`` computes attention (context parallelism replaces it), ``tensor_parallel`` is the group
of ranks that share the matrices.

Letters: B rows, T tokens, D model dim, H heads, G key/value heads, d head dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.attention_backend import (
    AttentionBackend,
    LocalAttention,
    QueryKeyValue,
)
from moesaic.nn.attention_config import AttentionConfig, Projection
from moesaic.nn.attention_parts import AttentionTemperature, Sinks, Window
from moesaic.nn.attention_scores import AttentionScores
from moesaic.nn.decode_state import DecodeState, KVState
from moesaic.nn.fused_projections import FusedProjections, fused_linear
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.newest_tokens import AttentionState, attend_newest, attention_state
from moesaic.nn.parameter_spec import ParameterSpec, linear_specs
from moesaic.nn.positional_encoding import PositionalEncoding
from moesaic.nn.qk_norm import QKNorm
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule
from moesaic.nn.shardable_module import (
    HeadShardedModule,
    ShardedTensor,
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
    bias: tuple[Projection, ...] | None = None
    qk_norm: QKNorm | None = None
    window: Window | None = None
    sinks: Sinks | None = None
    temperature: AttentionTemperature | None = None
    clip: float | None = Field(default=None, gt=0)
    scale: float | None = Field(default=None, gt=0)
    softcap: float | None = Field(default=None, gt=0)

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
        config, position = self.config(shape), self.encoding(shape)
        if position.biases_scores and (self.position or config.heads != shape.attention.heads):
            name = type(position).__name__
            return f"the model's position and heads, whose table {name} shares between the blocks"
        return config.problems(shape.dim, position=position)

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        config, numbers = self.config(shape), self.config(shape).numbers(shape.dim)
        query, keys = config.widths(shape.dim)
        biased = config.has_bias("query", "key", "value", default=shape.bias)
        widths = [width for width, has in zip((query, keys, keys), biased, strict=True) if has]
        bias = [ParameterSpec("bias", (sum(widths),))] if widths else []
        sinks = [ParameterSpec("bias", (config.heads,))] if config.sinks.learned else []
        (output,) = config.has_bias("output", default=shape.bias)
        return [
            *linear_specs(shape.dim, query + 2 * keys, bias=False),
            *bias,
            *linear_specs(query, shape.dim, bias=output),
            *config.qk_norm.parameter_specs(numbers),
            *sinks,
        ]

    def mixing_flops(self, shape: MixerShape, /, *, tokens: int) -> float:
        config = self.config(shape)
        pairs = config.window.mask(causal=shape.causal).num_pairs(tokens)
        return 4.0 * config.widths(shape.dim)[0] * pairs

    def shrink(self, shape: MixerShape, /) -> Self:
        width = self.head_dim and min(self.head_dim, shape.attention.head_width(shape.dim))
        return self.replace(head_dim=width, window=self.window and self.window.shrink())


class SelfAttention(HeadShardedModule, SequenceMixerModule, FusedProjections, CustomInitializers):
    """Self-attention with the heads of ``shape.attention``; q, k and v are one projection."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        config, dim = shape.attention, shape.dim
        self.heads, self.kv_heads, self.head_dim = (
            config.heads,
            config.num_kv_heads(),
            config.head_width(dim),
        )
        self.position, self.config = shape.position, config
        self.scale = config.score_scale(shape.position, dim=dim)
        biased = config.has_bias("query", "key", "value", "output", default=shape.bias)
        widths = self.fused_outputs()["qkv.weight"]
        self.qkv = fused_linear(dim, widths, biased=biased[:3])
        self.out = nn.Linear(self.heads * self.head_dim, dim, bias=biased[3])
        self.qk_norm = config.qk_norm.build(config.numbers(dim))
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks.learned else None
        self.backend: AttentionBackend = LocalAttention()
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"qkv.weight": (query, keys, keys)}

    def initializers(self) -> Mapping[str, Initializer]:
        return {} if self.sinks is None else {"sinks": Initializer(kind="bias")}

    def tensor_sharding(self) -> TensorSharding:
        segments = self.fused_outputs()["qkv.weight"]
        sinks = {} if self.sinks is None else {"sinks": ShardedTensor(0, (self.heads,))}
        linears = column_parallel("qkv", self.qkv, segments=segments)
        return TensorSharding(
            linears | row_parallel("out", self.out) | sinks,
            divided={"heads": self.heads, "kv_heads": self.kv_heads},
            row_parallel=("out",),
            refusal=self.config.qk_norm.tensor_refusal(),
        )

    def init_state(self, rows: int, *, like: Tensor) -> AttentionState:
        empty = KVState.empty(rows, kv_heads=self.kv_heads, head_dim=self.head_dim, like=like)
        return attention_state(empty, AttentionScores(self.config.window.mask(causal=True)))

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
        scores = self._scores(context)
        if not isinstance(state, AttentionState):
            return self.backend.self_attention(heads, packing=packing, scores=scores)
        slots = context.decode_slots
        return attend_newest(heads, packing=packing, slots=slots, state=state, scores=scores)

    def _scores(self, context: MixerContext) -> AttentionScores:
        return AttentionScores(
            self.config.window.mask(causal=context.causal),
            scale=self.scale,
            softcap=self.config.softcap,
            sinks=self.sinks,
            bias=context.score_bias if self.position.biases_scores else None,
        )

    def _project(self, x: Float[Tensor, "T D"], *, context: MixerContext) -> QueryKeyValue:
        heads, groups, norm, clip = self.heads, self.kv_heads, self.qk_norm, self.config.clip
        both, value = (
            self.qkv(x).unflatten(-1, (-1, self.head_dim)).split([heads + groups, groups], 1)
        )
        rotate = context.rotation(self.position, head_dim=self.head_dim)
        if norm is not None and not norm.after_rotation:
            query, key = both.split([heads, groups], 1)
            both = torch.cat([norm.normalise_query(query), norm.normalise_key(key)], 1)
        if clip is not None:
            both, value = both.clamp(-clip, clip), value.clamp(-clip, clip)
        query, key = rotate(both).split([heads, groups], 1)
        if norm is not None and norm.after_rotation:
            query, key = norm.normalise_query(query), norm.normalise_key(key)
        if (factor := self.config.temperature.query_factor(context.position)) is not None:
            query = (query * factor[:, None, None]).to(query.dtype)
        return QueryKeyValue(query, key, value)
