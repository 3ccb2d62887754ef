"""Attention experts: a mixture of self-attentions in one block, weighted per token.

Letters: B rows, T tokens, D model dim, N attention experts, H heads and G key/value heads of one,
d head dim.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.attention import SelfAttention
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.nn.positional_encoding import Rotation


@runtime_checkable
class SelfAttentionModule(Protocol):
    """The self-attention of a block (see ``SelfAttention``).

    Only one that is a ``ShardableAttention`` as well runs under tensor and context parallelism.
    """

    def __call__(
        self, x: Float[Tensor, "T D"], *, packing: Packing, rotation: Rotation, causal: bool
    ) -> Float[Tensor, "T D"]: ...

    def step(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        rotation: Rotation,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T D"]: ...


class AttentionExperts(Choice):
    """Family: one self-attention per block, or a mixture of them."""

    def combined_attention(self, config: AttentionConfig, _dim: int, /) -> AttentionConfig:
        """Return the heads of all experts together, given those of one attention."""
        return config

    def build(self, config: AttentionConfig, *, dim: int, bias: bool) -> SelfAttentionModule:
        """Return the self-attention module of a block."""
        raise NotImplementedError

    def parameter_specs(self, _dim: int, /) -> Sequence[ParameterSpec]:
        """Return its parameters beyond those of an attention with all heads."""
        return ()

    def saved_activations(self, _config: AttentionConfig, _dim: int, /) -> float:
        """Return the values per token that autograd saves beyond those of all heads."""
        return 0


class NoAttentionExperts(AttentionExperts):
    """One self-attention, as in a dense transformer."""

    def build(self, config: AttentionConfig, *, dim: int, bias: bool) -> SelfAttentionModule:
        return SelfAttention(config, dim=dim, bias=bias)


class MixtureOfAttention(AttentionExperts):
    """``sum_j g_j(x) attention_j(x)`` with ``g = softmax(W x)``: all run (BAM, 2408.08274).

    The soft mixture of Branch-Attend-Mix: every token uses all experts, so nothing is balanced, and
    its keys and values are in the KV cache for later tokens. With ``key_values="own"`` each expert
    has its own queries, keys, values and output projection, and the KV cache is N times as large;
    with ``"shared"`` only queries and output projections are separate. Our reading: biases of the
    output projections are one for all experts (the weights sum to 1).
    """

    experts: int = Field(default=2, ge=1)
    key_values: Literal["own", "shared"] = "own"

    def combined_attention(self, config: AttentionConfig, dim: int, /) -> AttentionConfig:
        groups = config.num_kv_heads() * (self.experts if self.key_values == "own" else 1)
        heads, width = config.heads * self.experts, config.head_width(dim)
        return AttentionConfig(heads=heads, kv_heads=groups, head_dim=width)

    def build(self, config: AttentionConfig, *, dim: int, bias: bool) -> SelfAttentionModule:
        return AttentionMixture(self, config=config, dim=dim, bias=bias)

    def parameter_specs(self, dim: int, /) -> Sequence[ParameterSpec]:
        return (ParameterSpec("router", (self.experts, dim)),)

    def saved_activations(self, config: AttentionConfig, dim: int, /) -> float:
        heads = self.combined_attention(config, dim)
        return heads.heads * heads.head_width(dim) + self.experts


class AttentionMixture(CustomInitializers):
    """One attention with the heads of all experts, weighted per expert before ``out``.

    The output projection adds over all heads, so weighting its input weights the output of each
    expert. Heads are sorted by expert; with shared keys by key/value head first, then by expert.
    """

    def __init__(
        self, mixture: MixtureOfAttention, *, config: AttentionConfig, dim: int, bias: bool
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, mixture.experts, bias=False)
        self.attention = SelfAttention(mixture.combined_attention(config, dim), dim=dim, bias=bias)
        self.experts = mixture.experts
        self.blocks = 1 if mixture.key_values == "own" else config.num_kv_heads()
        self.head_width = config.heads * config.head_width(dim)

    def token_mixers(self) -> tuple[SelfAttention, ...]:
        return (self.attention,)

    def initializers(self) -> Mapping[str, Initializer]:
        return {
            "gate.weight": Initializer(kind="router"),
            "attention.out.weight": Initializer(fan_in=self.head_width),
        }

    def forward(
        self, x: Float[Tensor, "T D"], *, packing: Packing, rotation: Rotation, causal: bool
    ) -> Float[Tensor, "T D"]:
        """Attend within each row (see ``SelfAttention``)."""
        heads = self.attention.attend_heads(x, packing=packing, rotation=rotation, causal=causal)
        return self.attention.out(self._weight_heads(heads, x=x))

    def step(
        self,
        x: Float[Tensor, "T D"],
        *,
        packing: Packing,
        rotation: Rotation,
        cache: KeyValue,
        position: Int[Tensor, "B n"],
    ) -> Float[Tensor, "T D"]:
        """Attend from the newest tokens; ``cache`` holds the keys of all experts."""
        heads = self.attention.attend_heads_cached(
            x, packing=packing, rotation=rotation, cache=cache, position=position
        )
        return self.attention.out(self._weight_heads(heads, x=x))

    def expert_weights(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T N"]:
        """Return the weights of the experts, float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.gate(x.float()).softmax(-1)

    def _weight_heads(
        self, heads: Float[Tensor, "T HD"], *, x: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T HD"]:
        weight = self.expert_weights(x).to(heads.dtype)
        by_expert = heads.unflatten(-1, (self.blocks, self.experts, -1))
        return (by_expert * weight[:, None, :, None]).flatten(1)
