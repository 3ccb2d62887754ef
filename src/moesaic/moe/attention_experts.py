"""Attention experts: a mixture of self-attentions in one block, weighted per token.

Letters: B rows, T tokens, D model dim, N attention experts, H heads and G key/value heads of one,
d head dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.attention import Attention, SelfAttention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule
from moesaic.nn.shardable_module import ContextScope, ContextSharding, TensorSharding


class MixtureOfAttention(SequenceMixer):
    """``sum_j g_j(x) attention_j(x)`` with ``g = softmax(W x)``: all run (BAM, 2408.08274).

    The soft mixture of Branch-Attend-Mix: every token uses all experts, so nothing is balanced, and
    its keys and values are in the KV cache for later tokens. With ``key_values="own"`` each expert
    has its own queries, keys, values and output projection, and the KV cache is N times as large;
    with ``"shared"`` only queries and output projections are separate. Our reading: biases of the
    output projections are one for all experts (the weights sum to 1).
    """

    experts: int = Field(default=2, ge=1)
    key_values: Literal["own", "shared"] = "own"

    branch = "self_attention"

    def combined_attention(self, shape: MixerShape) -> AttentionConfig:
        """Return the heads of all experts together, given those of one attention."""
        config = shape.attention
        groups = config.num_kv_heads() * (self.experts if self.key_values == "own" else 1)
        heads, width = config.heads * self.experts, config.head_width(shape.dim)
        return config.replace(heads=heads, kv_heads=groups, head_dim=width)

    def build(self, shape: MixerShape, /) -> SequenceMixerModule:
        return AttentionMixture(self, shape)

    def problems(self, shape: MixerShape, /) -> str | None:
        if shape.position.biases_scores:
            return "no RelativeBias, whose table has the heads of one attention"
        return Attention().problems(shape)

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        router = ParameterSpec("router", (self.experts, shape.dim))
        return [*Attention().parameter_specs(self._combined(shape)), router]

    def mixing_flops(self, shape: MixerShape, /, *, tokens: int) -> float:
        return Attention().mixing_flops(self._combined(shape), tokens=tokens)

    def _combined(self, shape: MixerShape) -> MixerShape:
        return replace(shape, attention=self.combined_attention(shape))


class AttentionMixture(SequenceMixerModule, CustomInitializers):
    """One attention with the heads of all experts, weighted per expert before ``out``.

    The output projection adds over all heads, so weighting its input weights the output of each
    expert. Heads are sorted by expert; with shared keys by key/value head first, then by expert.
    """

    def __init__(self, mixture: MixtureOfAttention, shape: MixerShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.dim, mixture.experts, bias=False)
        self.attention = SelfAttention(replace(shape, attention=mixture.combined_attention(shape)))
        self.experts, config = mixture.experts, shape.attention
        self.blocks = 1 if mixture.key_values == "own" else config.num_kv_heads()
        self.head_width = config.heads * config.head_width(shape.dim)

    def tensor_sharding(self) -> TensorSharding:
        return TensorSharding(
            refusal="has heads that belong to attention experts, and tensor ranks share heads"
        )

    def context_sharding(self) -> ContextSharding:
        """Return no bound: the attention inside declares its own."""
        return ContextSharding()

    def use_context_parallel(self, scope: ContextScope) -> None:
        """Do nothing: the attention inside is adapted by itself, weights are per token."""

    def initializers(self) -> Mapping[str, Initializer]:
        return {
            "gate.weight": Initializer(kind="router"),
            "attention.out.weight": Initializer(fan_in=self.head_width),
        }

    def init_state(self, rows: int, *, like: Tensor) -> DecodeState:
        return self.attention.init_state(rows, like=like)

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        """Attend within each row; ``state`` has the keys of all experts."""
        heads = self.attention.attend_heads(x, context=context, state=state)
        return self.attention.out(self._weight_heads(heads, x=x))

    def expert_weights(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T N"]:
        """Return the weights of the experts, float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.gate.weight.float()).softmax(-1)

    def _weight_heads(
        self, heads: Float[Tensor, "T HD"], *, x: Float[Tensor, "T D"]
    ) -> Float[Tensor, "T HD"]:
        weight = self.expert_weights(x).to(heads.dtype)
        by_expert = heads.unflatten(-1, (self.blocks, self.experts, -1))
        return (by_expert * weight[:, None, :, None]).flatten(1)
