"""Multi-head latent attention (MLA): keys and values are projections of one short latent per token.

DeepSeek-V2 (2405.04434, section 2.1) and V3 (2412.19437). A decode state has the latent and the
rotated key, which all heads share: ``kv_rank + rope_dim`` values per token.

Letters: B rows, T tokens, D model dim, H heads, n width of keys without positions, r of rotated
ones, v of values, c rank of the latent, S tokens of a decode state.
"""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.attention_backend import AttentionBackend, LocalAttention, QueryKeyValue
from moesaic.nn.attention_parts import NoWindow, Window
from moesaic.nn.attention_scores import AttentionScores
from moesaic.nn.decode_state import DecodeState, KVState
from moesaic.nn.newest_tokens import (
    AttentionState,
    attend_newest,
    attention_state,
    store_newest,
)
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.parameter_spec import ParameterSpec, linear_specs
from moesaic.nn.positional_encoding import PositionalEncoding
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule
from moesaic.nn.shardable_module import (
    HeadShardedModule,
    TensorSharding,
    column_parallel,
    row_parallel,
)
from moesaic.nn.tensor_parallel_group import NoTensorParallel, TensorParallelGroup


class LatentAttention(SequenceMixer):
    """Multi-head latent attention (MLA, DeepSeek-V2, 2405.04434; V3, 2412.19437).

    Each head has ``nope_dim`` channels without positions and ``rope_dim`` rotated ones; the rotated
    key is one for all heads. Keys and values are projected from a normalised latent of ``kv_rank``
    channels, queries from one of ``query_rank`` (None: from the input itself). ``heads`` and
    ``position`` default to the model's. Projections to latents and back to the residual stream have
    the model's ``bias``. Scores are ``(nope_dim + rope_dim) ** -0.5`` times the factor of the
    rotary scaling (YaRN with mscale). Decoding is in the absorbed form: queries attend to latents.
    """

    kv_rank: int = Field(default=512, ge=1)
    query_rank: int | None = Field(default=None, ge=1)
    nope_dim: int = Field(default=128, ge=1)
    rope_dim: int = Field(default=64, ge=2)
    value_dim: int = Field(default=128, ge=1)
    heads: int | None = Field(default=None, ge=1)
    position: PositionalEncoding | None = None
    window: Window = NoWindow()
    norm: Norm = RMSNorm()

    branch = "latent_attention"

    def num_heads(self, shape: MixerShape) -> int:
        """Return the number of heads."""
        return self.heads or shape.attention.heads

    def encoding(self, shape: MixerShape) -> PositionalEncoding:
        """Return what rotates queries and keys."""
        return self.position or shape.position

    @property
    def key_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.nope_dim + self.rope_dim

    def build(self, shape: MixerShape, /) -> SequenceMixerModule:
        return LatentAttentionModule(self, shape)

    def problems(self, shape: MixerShape, /) -> str | None:
        encoding = self.encoding(shape)
        if encoding.biases_scores:
            return f"rotary positions, not {type(encoding).__name__}"
        if self.value_dim > self.key_dim:
            return f"value_dim={self.value_dim} of at most nope_dim + rope_dim = {self.key_dim}"
        problem = encoding.problems(self.rope_dim)
        return problem and f"{problem} (rope_dim)"

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        dim, heads, bias = shape.dim, self.num_heads(shape), shape.bias
        query = linear_specs(self.query_rank or dim, heads * self.key_dim, bias=False)
        if self.query_rank is not None:
            query += linear_specs(dim, self.query_rank, bias=bias)
            query += self.norm.parameter_specs(self.query_rank)
        return [
            *query,
            *linear_specs(dim, self.kv_rank + self.rope_dim, bias=bias),
            *self.norm.parameter_specs(self.kv_rank),
            *linear_specs(self.kv_rank, heads * (self.nope_dim + self.value_dim), bias=False),
            *linear_specs(heads * self.value_dim, dim, bias=bias),
        ]

    def mixing_flops(self, shape: MixerShape, /, *, tokens: int) -> float:
        pairs = self.window.mask(causal=shape.causal).num_pairs(tokens)
        return 2.0 * self.num_heads(shape) * (self.key_dim + self.value_dim) * pairs

    def shrink(self, _shape: MixerShape, /) -> Self:
        rank = self.query_rank and min(self.query_rank, 6)
        widths = {"nope_dim": min(self.nope_dim, 4), "value_dim": min(self.value_dim, 4)}
        return self.replace(
            kv_rank=min(self.kv_rank, 8), query_rank=rank, rope_dim=min(self.rope_dim, 4), **widths
        )


class LatentAttentionModule(HeadShardedModule, SequenceMixerModule):
    """The module of ``LatentAttention``."""

    def __init__(self, config: LatentAttention, shape: MixerShape) -> None:
        super().__init__()
        self.config, self.heads = config, config.num_heads(shape)
        self.kv_heads = self.heads
        self.position = config.encoding(shape)
        self.scale = config.key_dim**-0.5 * self.position.score_factor()
        dim, bias, rank = shape.dim, shape.bias, config.query_rank
        self.query_down = None if rank is None else nn.Linear(dim, rank, bias=bias)
        self.query_norm = None if rank is None else config.norm.build(rank)
        self.query_up = nn.Linear(rank or dim, self.heads * config.key_dim, bias=False)
        self.kv_down = nn.Linear(dim, config.kv_rank + config.rope_dim, bias=bias)
        self.kv_norm = config.norm.build(config.kv_rank)
        up = self.heads * (config.nope_dim + config.value_dim)
        self.kv_up = nn.Linear(config.kv_rank, up, bias=False)
        self.out = nn.Linear(self.heads * config.value_dim, dim, bias=bias)
        self.backend: AttentionBackend = LocalAttention()
        self.tensor_parallel: TensorParallelGroup = NoTensorParallel()

    def tensor_sharding(self) -> TensorSharding:
        """Return the up projections sharded by head; latents are computed on every tensor rank."""
        query, keys = (x.out_features for x in (self.query_up, self.kv_up))
        return TensorSharding(
            column_parallel("query_up", self.query_up, segments=(query,))
            | column_parallel("kv_up", self.kv_up, segments=(keys,))
            | row_parallel("out", self.out),
            divided={"heads": self.heads},
            row_parallel=("out",),
        )

    def init_state(self, rows: int, *, like: Tensor) -> AttentionState:
        """Return an empty state: latents and rotated keys are the keys, values have no channels."""
        width = self.config.kv_rank + self.config.rope_dim
        key = like.new_zeros(rows, 1, 0, width)
        return attention_state(KVState(key, key[..., :0]), self._scores(causal=True))

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        """Attend within each row: whole rows with expanded keys, decoding with latents."""
        packing, group = context.packing, self.tensor_parallel
        query, latent, rotated = self._project(group.all_gather_tokens(x, packing), context=context)
        if isinstance(state, AttentionState):
            cached = torch.cat([latent, rotated], -1)[:, None]
            slots = context.decode_slots
            if not slots.is_first:
                heads = self._attend_absorbed(query, cached, context=context, state=state)
                return self.out(heads)
            store_newest(cached, cached[..., :0], packing=packing, slots=slots, state=state)
        mixed = self.backend.self_attention(
            QueryKeyValue(query, *self._expand(latent, rotated)),
            packing=packing,
            scores=self._scores(causal=context.causal),
        )
        heads = mixed.unflatten(-1, (self.heads, -1))[..., : self.config.value_dim].flatten(1)
        return group.reduce_scatter_tokens(self.out(heads), packing)

    def _scores(self, *, causal: bool) -> AttentionScores:
        return AttentionScores(self.config.window.mask(causal=causal), scale=self.scale)

    def _project(
        self, x: Float[Tensor, "T D"], *, context: MixerContext
    ) -> tuple[Float[Tensor, "T H n+r"], Float[Tensor, "T c"], Float[Tensor, "T r"]]:
        """Return queries, latents and the rotated key of all heads."""
        config, narrow = self.config, x
        if self.query_down is not None and self.query_norm is not None:
            narrow = self.query_norm(self.query_down(x))
        query = self.query_up(narrow).unflatten(-1, (self.heads, config.key_dim))
        latent, key = self.kv_down(x).split([config.kv_rank, config.rope_dim], -1)
        rotate = context.rotation(self.position, head_dim=config.rope_dim)
        nope, rope = query.split([config.nope_dim, config.rope_dim], -1)
        query = torch.cat([nope, rotate(rope)], -1)
        return query, self.kv_norm(latent), rotate(key[:, None])[:, 0]

    def _expand(
        self, latent: Float[Tensor, "T c"], rotated: Float[Tensor, "T r"]
    ) -> tuple[Float[Tensor, "T H n+r"], Float[Tensor, "T H n+r"]]:
        """Return keys and values of every head; values are padded to the width of keys."""
        config = self.config
        widths = [config.nope_dim, config.value_dim]
        nope, value = self.kv_up(latent).unflatten(-1, (self.heads, -1)).split(widths, -1)
        shared = rotated[:, None].expand(-1, self.heads, -1)
        value = F.pad(value, (0, config.key_dim - config.value_dim))
        return torch.cat([nope, shared], -1), value

    def _attend_absorbed(
        self,
        query: Float[Tensor, "T H n+r"],
        cached: Float[Tensor, "T 1 c+r"],
        *,
        context: MixerContext,
        state: AttentionState,
    ) -> Float[Tensor, "T Hv"]:
        """Attend to latents: the key projection is moved to the query, that of values behind."""
        config = self.config
        up = self.kv_up.weight.unflatten(0, (self.heads, -1))
        key_up, value_up = up.split([config.nope_dim, config.value_dim], 1)  # [H, n or v, c]
        nope, rope = query.split([config.nope_dim, config.rope_dim], -1)
        query = torch.cat([torch.einsum("thd,hdc->thc", nope, key_up), rope], -1)
        mixed = attend_newest(
            QueryKeyValue(query, cached, cached[..., :0]),
            packing=context.packing,
            slots=context.decode_slots,
            state=state,
            scores=self._scores(causal=True),
        )
        latents = mixed.unflatten(-1, (self.heads, -1))[..., : config.kv_rank]
        return torch.einsum("thc,hdc->thd", latents, value_up).flatten(1)
