"""Multi-head self-attention and cross-attention.

``backend`` computes attention (context parallelism replaces it), ``tensor_parallel`` is the group
of ranks that share the matrices.

Letters: B rows, S source length, T tokens, D model dim, H heads, G key/value heads, d head dim.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.nn.attention_backend import (
    AttentionBackend,
    KeyValue,
    LocalAttention,
    QueryKeyValue,
    attend,
    pad_heads,
)
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.fused_projections import FusedProjections
from moesaic.nn.packing import Packing
from moesaic.nn.positional_encoding import Rotation
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup


@runtime_checkable
class ShardableAttention(Protocol):
    """An attention that computes the same where a row's tokens are on several ranks.

    ``token_mixers``: the modules in which, and only in which, it mixes tokens. Context parallelism
    replaces their ``backend``, tensor parallelism their ``tensor_parallel``.
    """

    def token_mixers(self) -> "tuple[SelfAttention | CrossAttention, ...]": ...


class SelfAttention(FusedProjections):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, config: AttentionConfig, *, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.heads,
            config.num_kv_heads(),
            config.head_width(dim),
        )
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(self.heads * self.head_dim, dim, bias=bias)
        self.backend: AttentionBackend = LocalAttention()
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def token_mixers(self) -> "tuple[SelfAttention, ...]":
        return (self,)

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"qkv.weight": (query, keys, keys)}

    def forward(
        self, x: Float[Tensor, "T D"], *, packing: Packing, rotation: Rotation, causal: bool
    ) -> Float[Tensor, "T D"]:
        """Attend within each row; ``causal``: to a token itself and to those before it."""
        x = self.tensor_parallel.all_gather_tokens(x, packing)
        heads = self.attend_heads(x, packing=packing, rotation=rotation, causal=causal)
        return self.tensor_parallel.reduce_scatter_tokens(self.out(heads), packing)

    def step(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        rotation: Rotation,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T D"]:
        """Attend from the newest tokens to all so far; writes ``cache`` at ``position``."""
        heads = self.attend_heads_cached(
            x, packing=packing, rotation=rotation, cache=cache, position=position
        )
        return self.out(heads)

    def attend_heads(
        self, x: Float[Tensor, "T D"], *, packing: Packing, rotation: Rotation, causal: bool
    ) -> Float[Tensor, "T HD"]:
        """Return the concatenated heads, before the output projection."""
        return self.backend.self_attention(
            self._project(x, rotation=rotation), packing=packing, causal=causal
        )

    def attend_heads_cached(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        rotation: Rotation,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T HD"]:
        """Return the concatenated heads of the newest tokens (see ``step``)."""
        heads = self._project(x, rotation=rotation)
        new = KeyValue(pad_heads(heads.key, packing), pad_heads(heads.value, packing))
        cache.write(new, position=position)
        query = pad_heads(heads.query, packing)
        places = torch.arange(cache.key.shape[2], device=x.device)
        seen = places <= position[:, None, :, None]
        return packing.pack(attend(query, cache, mask=seen, causal=False))

    def _project(self, x: Float[Tensor, "T D"], *, rotation: Rotation) -> QueryKeyValue:
        heads, groups = self.heads, self.kv_heads
        both, value = (
            self.qkv(x).unflatten(-1, (-1, self.head_dim)).split([heads + groups, groups], 1)
        )
        query, key = rotation(both).split([heads, groups], 1)
        return QueryKeyValue(query, key, value)


class CrossAttention(FusedProjections):
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

    def token_mixers(self) -> "tuple[CrossAttention, ...]":
        return (self,)

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        keys = self.kv_heads * self.head_dim
        return {"kv.weight": (keys, keys)}

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
