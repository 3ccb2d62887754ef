"""Llama 4: weights on inputs of experts, chunks of attention, layers without rotary positions."""

from dataclasses import dataclass
from typing import Any

from moesaic.core.config_errors import show_value
from moesaic.core.errors import ConfigError
from moesaic.exchange.config_entries import (
    FULL,
    BalanceLoss,
    RotaryPositions,
    SwitchedQKNorm,
    shortest_pattern,
    values_of_layers,
)
from moesaic.exchange.config_mapping import (
    ConfigEntry,
    ConfigMapping,
    FixedKey,
    Key,
    Theirs,
)
from moesaic.exchange.decoder_families import (
    CHOSEN,
    FEED_FORWARD,
    GATE_AND_UP,
    HEAD_DIM,
    LAYER,
    LLAMA_TENSORS,
    LOCAL_EXPERTS,
    NO_BIAS,
    ROUTED,
    SIZES,
    SPARSE_MODEL,
    epsilon,
    llama_like,
    projections,
    shared_tensors,
)
from moesaic.exchange.family import FUSED
from moesaic.exchange.tensor_table import Rows
from moesaic.model.config import ModelConfig
from moesaic.model.mixer_pattern import DEFAULT_MIXER
from moesaic.moe.expert_selection import SigmoidTopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention import Attention
from moesaic.nn.attention_parts import (
    Chunks,
    FixedTemperature,
    LogPositionTemperature,
    NoWindow,
)
from moesaic.nn.positional_encoding import NoPositionalEncoding, Rotary
from moesaic.nn.qk_norm import L2QKNorm, NoQKNorm

CHUNKED, NO_ROTARY = "chunked_attention", "no_rotary"
_CHUNK, _NO_ROPE, _TUNING = "attention_chunk_size", "no_rope_layers", "attn_temperature_tuning"


@dataclass(frozen=True)
class RotaryLayers(ConfigEntry):
    """``no_rope_layers`` (1: rotary positions, in chunks) and what the layers without them have."""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        layers, interval = theirs.get("num_hidden_layers", 0), "no_rope_layer_interval"
        every = theirs.get(interval) or 4
        rotary = theirs.get(_NO_ROPE) or [(i + 1) % every for i in range(layers)]
        size = theirs.get(_CHUNK, 8192)
        kinds = theirs.get("layer_types")
        if kinds and kinds != [_kind(has, size) for has in rotary]:
            expected = f"{CHUNKED} where {_NO_ROPE} is 1, else {FULL}"
            raise ConfigError([f"layer_types: found {show_value(kinds)}, expected {expected}"])
        window = NoWindow() if size is None else Chunks(size=size)
        if all(rotary):
            return {"attention.window": window}
        tuned = LogPositionTemperature(
            weight=theirs.get("attn_scale", 0.1), interval=theirs.get("floor_scale", 8192)
        )
        other = Attention(
            position=NoPositionalEncoding(),
            window=NoWindow(),
            qk_norm=NoQKNorm(),
            temperature=tuned if theirs.get(_TUNING, True) else FixedTemperature(),
        )
        names = [DEFAULT_MIXER if has else NO_ROTARY for has in rotary]
        return {
            "attention.window": window,
            "mixers": {NO_ROTARY: other.to_dict()},
            "decoder.pattern": shortest_pattern(names),
        }

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        rotary = [int(isinstance(one, Rotary)) for one in values_of_layers(ours, "position")]
        window = ours.attention.window
        size = window.size if isinstance(window, Chunks) else None
        keys = {_NO_ROPE: rotary, _CHUNK: size, _TUNING: False}
        keys["layer_types"] = [_kind(has, size) for has in rotary]
        found = values_of_layers(ours, "attention.temperature")
        tuned = next((one for one in found if isinstance(one, LogPositionTemperature)), None)
        if tuned is None:
            return keys
        return keys | {_TUNING: True, "attn_scale": tuned.weight, "floor_scale": tuned.interval}


def _kind(rotary: int, chunk: int | None) -> str:
    return CHUNKED if rotary and chunk is not None else FULL


@dataclass(frozen=True)
class ListedSparseLayers(ConfigEntry):
    """``moe_layers``, or each ``interleave_moe_layer_step``-th layer."""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        layers, step = theirs.get("num_hidden_layers", 0), "interleave_moe_layer_step"
        every = theirs.get(step) or 1
        listed = theirs.get("moe_layers")
        sparse = list(range(every - 1, layers, every)) if listed is None else sorted(listed)
        return {"decoder.sparse_layers": None if len(sparse) == layers else sparse}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        return {"moe_layers": list(ours.decoder.moe_layers)}


_LAYER = f"{LAYER}feed_forward."
LLAMA4 = llama_like(
    "llama4_text",
    "Llama4ForCausalLM",
    ConfigMapping(
        SPARSE_MODEL.replace(
            position=Rotary(pairing="neighbouring"),
            moe=SPARSE_MODEL.moe.replace(
                select=SigmoidTopK(k=1, normalise="none"),
                weights_on="inputs",
                shared_experts=SharedExperts(),
            ),
        ),
        (
            *SIZES,
            HEAD_DIM,
            Key("intermediate_size", "moe.hidden"),
            Key("intermediate_size_mlp", "feed_forward.hidden", default=16384),
            LOCAL_EXPERTS,
            CHOSEN,
            epsilon(default=1e-5),
            SwitchedQKNorm(lambda eps: L2QKNorm(eps=eps), default=True, epsilon=1e-5),
            RotaryPositions(theta=5e5),
            RotaryLayers(),
            ListedSparseLayers(),
            BalanceLoss(),
            FixedKey("router_jitter_noise", 0.0),
            NO_BIAS,
        ),
        frozenset(
            {"no_rope_layer_interval", "interleave_moe_layer_step", "attn_scale", "floor_scale"}
        ),
    ),
    {
        FUSED: {
            **LLAMA_TENSORS,
            f"{FEED_FORWARD}inner.up.weight": projections(*GATE_AND_UP, of="feed_forward"),
            f"{FEED_FORWARD}inner.down.weight": projections("down_proj", of="feed_forward"),
            f"{ROUTED}router.gate.weight": Rows(f"{_LAYER}router.weight"),
            f"{ROUTED}experts.up": Rows(f"{_LAYER}experts.gate_up_proj"),
            f"{ROUTED}experts.down": Rows(f"{_LAYER}experts.down_proj"),
            **shared_tensors("feed_forward.shared_expert"),
        }
    },
)
