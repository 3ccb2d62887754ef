"""GPT-OSS: alternating windows, attention sinks, biases, and experts with a clamped SwiGLU."""

from moesaic.exchange.config_entries import (
    BalanceLoss,
    RotaryPositions,
    Windows,
    alternating_windows,
)
from moesaic.exchange.config_mapping import ConfigMapping, FixedKey, Key
from moesaic.exchange.decoder_families import (
    ATTENTION,
    CHOSEN,
    EXPERTS_AS_WIDE,
    HEAD_DIM,
    LAYER,
    LLAMA_TENSORS,
    LOCAL_EXPERTS,
    QKV_BIAS,
    ROUTED,
    SIZES,
    SPARSE_MODEL,
    epsilon,
    llama_like,
    projections,
)
from moesaic.exchange.family import FUSED
from moesaic.exchange.tensor_table import InterleavedExperts, Rows
from moesaic.moe.router_gate import IndependentRouters
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_parts import LearnedSinks
from moesaic.nn.feed_forward import ClampedSwiGLU

_EXPERTS = f"{LAYER}mlp.experts."
GPT_OSS = llama_like(
    "gpt_oss",
    "GptOssForCausalLM",
    ConfigMapping(
        SPARSE_MODEL.replace(
            bias=True,
            attention=AttentionConfig(heads=1, sinks=LearnedSinks()),
            feed_forward=SPARSE_MODEL.feed_forward.replace(activation=ClampedSwiGLU()),
            moe=SPARSE_MODEL.moe.replace(cross_layer=IndependentRouters(bias=True)),
        ),
        (
            *SIZES,
            HEAD_DIM,
            EXPERTS_AS_WIDE,
            LOCAL_EXPERTS,
            CHOSEN,
            epsilon(default=1e-5),
            RotaryPositions(theta=150000.0),
            Windows(default_kinds=alternating_windows),
            BalanceLoss(),
            Key("swiglu_alpha", "feed_forward.activation.alpha", default=1.702),
            Key("swiglu_limit", "feed_forward.activation.limit", default=7.0),
            FixedKey("attention_bias", value=True),
        ),
        frozenset({"initial_context_length", "experts_per_token", "quantization_config"}),
    ),
    {
        FUSED: {
            **LLAMA_TENSORS,
            **QKV_BIAS,
            f"{ATTENTION}inner.out.bias": projections("o_proj", of="self_attn", kind="bias"),
            f"{ATTENTION}inner.sinks": Rows(f"{LAYER}self_attn.sinks"),
            f"{ROUTED}router.gate.weight": Rows(f"{LAYER}mlp.router.weight"),
            f"{ROUTED}router.gate.bias": Rows(f"{LAYER}mlp.router.bias"),
            f"{ROUTED}experts.up": InterleavedExperts(f"{_EXPERTS}gate_up_proj"),
            f"{ROUTED}experts.up_bias": InterleavedExperts(f"{_EXPERTS}gate_up_proj_bias"),
            f"{ROUTED}experts.down": Rows(f"{_EXPERTS}down_proj"),
            f"{ROUTED}experts.down_bias": Rows(f"{_EXPERTS}down_proj_bias"),
        }
    },
)
