"""Multi-head cross-attention, from the tokens of a decoder to the states of an encoder.

``backend`` and ``tensor_parallel`` are as in ``nn/attention.py``.

Letters: B rows, S source length, T tokens, D model dim, d head dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from moesaic.core.shapes import Bool, Float, Tensor
from moesaic.nn.attention_backend import AttentionBackend, KeyValue, LocalAttention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_scores import AttentionMask, AttentionScores
from moesaic.nn.fused_projections import FusedProjections, fused_linear
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec, linear_specs
from moesaic.nn.shardable_module import (
    HeadShardedModule,
    TensorSharding,
    column_parallel,
    row_parallel,
)
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup


@dataclass(frozen=True, slots=True)
class CrossAttentionCount:
    """Parameters and saved values of a cross-attention, from its config."""

    config: AttentionConfig
    dim: int
    bias: bool

    def parameter_specs(self) -> Sequence[ParameterSpec]:
        """Return the parameters of ``CrossAttention``."""
        (query, keys), dim = self.config.widths(self.dim), self.dim
        biased = self.config.has_bias("query", "key", "value", "output", default=self.bias)
        kv_bias = keys * sum(biased[1:3])
        return [
            *linear_specs(dim, query, bias=biased[0]),
            *linear_specs(dim, 2 * keys, bias=False),
            *([ParameterSpec("bias", (kv_bias,))] if kv_bias else []),
            *linear_specs(query, dim, bias=biased[3]),
            *self.config.qk_norm.parameter_specs(self.config.numbers(dim)),
        ]


class CrossAttention(HeadShardedModule, FusedProjections):
    """Attention from target tokens to the encoder's states, without positions."""

    def __init__(self, config: AttentionConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.heads,
            config.num_kv_heads(),
            config.head_width(dim),
        )
        self.config = config
        biased = config.has_bias("query", "key", "value", "output", default=bias)
        self.query = nn.Linear(dim, self.heads * self.head_dim, bias=biased[0])
        self.kv = fused_linear(dim, self.fused_outputs()["kv.weight"], biased=biased[1:3])
        self.out = nn.Linear(self.heads * self.head_dim, dim, bias=biased[3])
        self.qk_norm = config.qk_norm.build(config.numbers(dim))
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
            refusal=self.config.qk_norm.tensor_refusal(),
        )

    def project_source(self, encoder_states: Float[Tensor, "T D"], *, packing: Packing) -> KeyValue:
        """Return keys and values of the source, once per layer and batch."""
        states = self.tensor_parallel.all_gather_tokens(encoder_states, packing)
        both = self.kv(states).unflatten(-1, (-1, self.head_dim))
        key, value = both.split(self.kv_heads, 1)
        if self.qk_norm is not None:
            key = self.qk_norm.normalise_key(key)
        return self.backend.project_source(self._clip(key), self._clip(value), packing=packing)

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
        if self.qk_norm is not None:
            query = self.qk_norm.normalise_query(query)
        heads = self.backend.cross_attention(
            self._clip(query), packing=packing, source=source, mask=mask, scores=self._scores
        )
        return self.tensor_parallel.reduce_scatter_tokens(self.out(heads), packing)

    @property
    def _scores(self) -> AttentionScores:
        everything = AttentionMask(causal=False)
        return AttentionScores(everything, scale=self.config.scale, softcap=self.config.softcap)

    def _clip(self, x: Float[Tensor, "T H d"]) -> Float[Tensor, "T H d"]:
        return x if self.config.clip is None else x.clamp(-self.config.clip, self.config.clip)
