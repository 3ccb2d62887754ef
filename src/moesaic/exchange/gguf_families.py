"""GGUF architectures as data: names of tensors, and what llama.cpp computes of each family.

The names are those of the ``gguf`` package (0.19); what an architecture fixes is that of
llama.cpp's graphs: whether the weights of chosen experts are normalised, for example, is no field
of a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moesaic.core.config_errors import show_value
from moesaic.core.errors import CheckpointError
from moesaic.exchange.config_mapping import field_of, is_absent
from moesaic.exchange.decoder_families import ATTENTION, FEED_FORWARD, ROUTED, SHARED
from moesaic.exchange.families import FAMILIES
from moesaic.exchange.family import Family
from moesaic.exchange.tensor_table import FusedExperts, Rows, TensorTable
from moesaic.model.config import ModelConfig
from moesaic.moe.config import MoE
from moesaic.nn.attention_parts import NoWindow
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import AcrossHeadsQKNorm
from moesaic.nn.rotary_scaling import (
    LinearScaling,
    Llama3Scaling,
    NoRotaryScaling,
    RotaryScaling,
    YaRN,
)

LAYOUT = "gguf"
_BLOCK = "blk.{layer}."


def _block(*names: str, kind: str = "weight") -> Rows:
    return Rows(*(f"{_BLOCK}{name}.{kind}" for name in names))


GGUF_TENSORS: TensorTable = {
    "embedding.weight": Rows("token_embd.weight"),
    "embedding.output": Rows("output.weight"),
    "decoder_norm.weight": Rows("output_norm.weight"),
    f"{ATTENTION}norm.weight": _block("attn_norm"),
    f"{ATTENTION}inner.qkv.weight": _block("attn_q", "attn_k", "attn_v"),
    f"{ATTENTION}inner.qkv.bias": _block("attn_q", "attn_k", "attn_v", kind="bias"),
    f"{ATTENTION}inner.out.weight": _block("attn_output"),
    f"{ATTENTION}inner.qk_norm.query.weight": _block("attn_q_norm"),
    f"{ATTENTION}inner.qk_norm.key.weight": _block("attn_k_norm"),
    f"{FEED_FORWARD}norm.weight": _block("ffn_norm"),
    f"{ROUTED}up.weight": _block("ffn_gate", "ffn_up"),
    f"{ROUTED}down.weight": _block("ffn_down"),
    f"{ROUTED}router.gate.weight": _block("ffn_gate_inp"),
    f"{ROUTED}experts.up": FusedExperts(
        f"{_BLOCK}ffn_gate_exps.weight", f"{_BLOCK}ffn_up_exps.weight"
    ),
    f"{ROUTED}experts.down": FusedExperts(f"{_BLOCK}ffn_down_exps.weight"),
    f"{SHARED}feed_forward.up.weight": _block("ffn_gate_shexp", "ffn_up_shexp"),
    f"{SHARED}feed_forward.down.weight": _block("ffn_down_shexp"),
    f"{SHARED}gate.weight": _block("ffn_gate_inp_shexp"),
}
_ROTATED = r"blk\.\d+\.attn_[qk](_norm)?\.(weight|bias)"
_ALWAYS: Mapping[str, Any] = {
    "attention.window": NoWindow(),
    "attention.clip": None,
}
_SCALINGS = (NoRotaryScaling, LinearScaling, YaRN)


@dataclass(frozen=True)
class GGUFArchitecture:
    """An architecture of llama.cpp: what it is named, how it rotates, and what it fixes.

    ``fixed`` are fields of our config that a model must have, if it has them at all.
    """

    name: str
    pairing: str = "halves"
    scalings: tuple[type[RotaryScaling], ...] = _SCALINGS
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def family(self, of: Family) -> Family:
        """Return a family whose tensors have the names of GGUF."""
        template = of.mapping.template
        position = template.position
        assert isinstance(position, Rotary)
        template = template.replace(position=position.replace(pairing=self.pairing))
        mapping = replace(of.mapping, template=template)
        return replace(of, mapping=mapping, layouts={LAYOUT: GGUF_TENSORS}, rotated=_ROTATED)

    def require_computable(self, model: ModelConfig) -> None:
        """Raise CheckpointError that names what llama.cpp computes otherwise in a model."""
        wrong = [
            f"{path} is {show_value(found)}, there {show_value(value)}"
            for path, value in {**_ALWAYS, **self.fixed}.items()
            if not is_absent(found := field_of(model, path)) and found != value
        ]
        assert isinstance(model.position, Rotary)
        if not self._can_scale(model.position.scaling):
            wrong.append(f"position.scaling is {model.position.scaling}")
        stack = model.decoder
        dense = [layer for layer in range(stack.layers) if not stack.is_moe_layer(layer)]
        if dense and isinstance(model.moe, MoE):
            wrong.append(f"decoder has dense layers ({dense}) beside those with experts")
        heads = model.attention
        if isinstance(heads.qk_norm, AcrossHeadsQKNorm) and heads.num_kv_heads() < heads.heads:
            wrong.append(f"attention.kv_heads is {heads.num_kv_heads()}, there {heads.heads}")
        if wrong:
            raise CheckpointError(
                f"llama.cpp computes {self.name} models otherwise: model.{'; model.'.join(wrong)}"
            )

    def _can_scale(self, scaling: RotaryScaling) -> bool:
        usual = ("factor", "original_length", "beta_fast", "beta_slow")
        if isinstance(scaling, YaRN):
            return scaling == YaRN(**{name: getattr(scaling, name) for name in usual})
        return isinstance(scaling, self.scalings)


_NORMALISED = {"moe.select.normalise": "before"}
_NOT_NORMALISED = {"moe.select.normalise": "none"}
_LLAMA = GGUFArchitecture(
    "llama", pairing="neighbouring", scalings=(*_SCALINGS, Llama3Scaling), fixed=_NORMALISED
)
ARCHITECTURES: Mapping[str, GGUFArchitecture] = {  # by model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": GGUFArchitecture("qwen2"),
    "qwen3": GGUFArchitecture("qwen3"),
    "qwen2_moe": GGUFArchitecture("qwen2moe", fixed=_NOT_NORMALISED),
    "qwen3_moe": GGUFArchitecture("qwen3moe", fixed=_NORMALISED),
    "olmoe": GGUFArchitecture("olmoe", fixed=_NOT_NORMALISED),
}


def gguf_architecture(family: Family) -> GGUFArchitecture:
    """Return the architecture of a family. Raises CheckpointError if we write none."""
    if family.model_type not in ARCHITECTURES:
        known = ", ".join(name for name in FAMILIES if name in ARCHITECTURES)
        raise CheckpointError(
            f"{family.model_type} is written for transformers (--to hf) and not as GGUF, which "
            f"takes {known}"
        )
    return ARCHITECTURES[family.model_type]
