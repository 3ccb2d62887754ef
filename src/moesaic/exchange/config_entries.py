"""Config entries that are more than a key and a field: rotary positions, windows, layers, losses.

The names of keys are those of transformers 5 (``rope_parameters``) and, in reading, of 4
(``rope_theta``, ``rope_scaling``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moesaic.core.config_errors import show_value
from moesaic.core.errors import ConfigError
from moesaic.exchange.config_mapping import ConfigEntry, Theirs, field_of, is_absent
from moesaic.model.config import ModelConfig
from moesaic.model.mixer_pattern import DEFAULT_MIXER
from moesaic.moe.auxiliary_losses import Balance, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.nn.attention import Attention
from moesaic.nn.attention_parts import NoWindow, SlidingWindow
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import NoQKNorm, QKNorm
from moesaic.nn.rotary_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    NoRotaryScaling,
    RotaryScaling,
    YaRN,
)

LENGTH = "max_position_embeddings"


@dataclass(frozen=True)
class RotaryPositions(ConfigEntry):
    """Rotary positions: theta, the scaling, and the part of the channels that rotates.

    ``fraction`` is that part where no key has it; None: all channels rotate in this family.

    ``mscale_all_dim`` of YaRN scales scores in the families of DeepSeek (``scales_scores``), and
    rotated channels alone in others.
    """

    theta: float = 10000.0
    scales_scores: bool = False
    fraction: float | None = None

    def read(self, theirs: Theirs) -> dict[str, Any]:
        given = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
        if any(isinstance(value, Mapping) for value in given.values()):
            raise ConfigError(["rope_parameters: found several, expected one for all layers"])
        theta = given.get("rope_theta") or theirs.get("rope_theta") or self.theta
        part = given.get("partial_rotary_factor") or theirs.get("partial_rotary_factor")
        if not part and (channels := theirs.get("rotary_dim")):  # MiniMax-M2, as it was released
            part = channels / theirs["head_dim"]
        part = part or self.fraction or 1.0
        if part != 1 and self.fraction is None:
            found = f"partial_rotary_factor: found {show_value(part)}"
            raise ConfigError([f"{found}, of which we have 1 alone in this family"])
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in _READ_SCALING:
            known = ", ".join(_READ_SCALING)
            raise ConfigError([f"rope_type: found {show_value(kind)}, expected one of {known}"])
        try:
            scaling = _READ_SCALING[kind](given, theirs.get(LENGTH))
        except KeyError as error:
            raise ConfigError([f"rope_parameters: found no {error.args[0]} of {kind}"]) from error
        if isinstance(scaling, YaRN) and scaling.mscale_all_dim and not self.scales_scores:
            factor = scaling.magnitude()
            scaling = scaling.replace(attention_factor=factor, mscale=None, mscale_all_dim=None)
        return {
            "position.theta": theta,
            "position.fraction": part,
            "position.scaling": scaling,
        }

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        position = ours.position
        if not isinstance(position, Rotary):
            return {}
        whole = position.fraction == 1 and self.fraction is None
        part = {} if whole else {"partial_rotary_factor": position.fraction}
        scaling, length = _write_scaling(position.scaling)
        return {"rope_parameters": {"rope_theta": position.theta, **scaling, **part}} | length


def _read_yarn(given: Theirs, longest: Any) -> RotaryScaling:
    scales = {key: given[key] for key in ("mscale", "mscale_all_dim") if given.get(key)}
    return YaRN(
        factor=given["factor"],
        original_length=given.get(f"original_{LENGTH}") or longest,
        beta_fast=given.get("beta_fast") or 32,
        beta_slow=given.get("beta_slow") or 1,
        ramp_ends="whole" if given.get("truncate", True) else "exact",
        attention_factor=given.get("attention_factor"),
        **scales,
    )


def _read_llama3(given: Theirs, longest: Any) -> RotaryScaling:
    return Llama3Scaling(
        factor=given["factor"],
        original_length=given.get(f"original_{LENGTH}") or longest,
        low_freq_factor=given["low_freq_factor"],
        high_freq_factor=given["high_freq_factor"],
    )


def _read_longrope(given: Theirs, longest: Any) -> RotaryScaling:
    original = given.get(f"original_{LENGTH}") or longest
    return LongRoPE(
        factor=given.get("factor") or longest / original,
        original_length=original,
        short_factors=given["short_factor"],
        long_factors=given["long_factor"],
    )


_READ_SCALING: dict[str, Callable[[Theirs, Any], RotaryScaling]] = {
    "default": lambda _given, _longest: NoRotaryScaling(),
    "linear": lambda given, _longest: LinearScaling(factor=given["factor"]),
    "dynamic": lambda given, longest: DynamicNTKScaling(
        factor=given["factor"], original_length=longest
    ),
    "yarn": _read_yarn,
    "llama3": _read_llama3,
    "longrope": _read_longrope,
}


def _write_scaling(scaling: RotaryScaling) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of ``rope_parameters``, and those outside of it."""
    original = f"original_{LENGTH}"
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}, {}
        case DynamicNTKScaling():
            keys = {"rope_type": "dynamic", "factor": scaling.factor}
            return keys, {LENGTH: scaling.original_length}
        case YaRN():
            names = ("factor", "beta_fast", "beta_slow", "attention_factor")
            scales = {n: getattr(scaling, n) for n in (*names, "mscale", "mscale_all_dim")}
            keys = {name: value for name, value in scales.items() if value is not None}
            exact = scaling.ramp_ends == "exact"
            keys |= {"truncate": False} if exact else {}
            return {"rope_type": "yarn", original: scaling.original_length} | keys, {}
        case Llama3Scaling():
            names = ("factor", "low_freq_factor", "high_freq_factor")
            keys = {name: getattr(scaling, name) for name in names}
            return {"rope_type": "llama3", original: scaling.original_length} | keys, {}
        case LongRoPE():
            keys = {"short_factor": scaling.short_factors, "long_factor": scaling.long_factors}
            numbers = {"factor": scaling.factor, original: scaling.original_length}
            return {"rope_type": "longrope"} | numbers | keys, {}
    return {"rope_type": "default"}, {}


FULL, SLIDING = "full_attention", "sliding_attention"
LayerKinds = Callable[[Theirs, int], list[str]]  # of the keys and the number of layers


def alternating_windows(theirs: Theirs, layers: int) -> list[str]:
    """Return the kinds of layers where every other one has a window, the first too (GPT-OSS)."""
    del theirs
    return [FULL if layer % 2 else SLIDING for layer in range(layers)]


def windows_above(theirs: Theirs, layers: int) -> list[str]:
    """Return the kinds of layers where those from ``max_window_layers`` on have one (Qwen2, 3)."""
    return [SLIDING if layer >= _max_window_layers(theirs) else FULL for layer in range(layers)]


def alternating_windows_below(theirs: Theirs, layers: int) -> list[str]:
    """Return the kinds of layers where even ones below ``max_window_layers`` have one (Qwen2-MoE).

    That is what transformers 5 does, though Qwen2 means the layers from that number on.
    """
    most = min(_max_window_layers(theirs), layers)
    return alternating_windows(theirs, most) + [FULL] * (layers - most)


def _max_window_layers(theirs: Theirs) -> int:
    value = theirs.get("max_window_layers")
    return 28 if value is None else value  # what an absent key means there


@dataclass(frozen=True)
class Windows(ConfigEntry):
    """``sliding_window`` of all layers or of those that ``layer_types`` names.

    ``switch`` is the key that says whether it is used, where there is one. ``default_kinds`` are
    the layers of a config without ``layer_types``; None for a family that has no such key.
    """

    switch: str | None = None
    default_kinds: LayerKinds | None = None

    def read(self, theirs: Theirs) -> dict[str, Any]:
        size, layers = theirs.get("sliding_window"), theirs.get("num_hidden_layers") or 0
        if self.switch is not None and not theirs.get(self.switch):
            size = None
        kinds = self._layer_types(theirs, layers=layers)
        if unknown := set(kinds) - {FULL, SLIDING}:
            raise ConfigError([f"layer_types: found {show_value(sorted(unknown)[0])}"])
        if not size or SLIDING not in kinds:
            return {"attention.window": NoWindow()}
        window = SlidingWindow(size=size)
        if FULL not in kinds:
            return {"attention.window": window}
        return {
            "mixers": {"sliding": Attention(window=window).to_dict()},
            "decoder.pattern": shortest_pattern([_MIXER_OF_KIND[kind] for kind in kinds]),
        }

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        windows = values_of_layers(ours, "attention.window")
        size = next((w.size for w in windows if isinstance(w, SlidingWindow)), None)
        keys: dict[str, Any] = {} if self.switch is None else {self.switch: size is not None}
        if self.default_kinds is not None:
            kinds = [SLIDING if isinstance(w, SlidingWindow) else FULL for w in windows]
            keys["layer_types"] = kinds
        return {"sliding_window": size} | keys

    def _layer_types(self, theirs: Theirs, *, layers: int) -> Sequence[str]:
        if self.default_kinds is None:
            return [SLIDING] * layers
        return theirs.get("layer_types") or self.default_kinds(theirs, layers)


_MIXER_OF_KIND = {FULL: DEFAULT_MIXER, SLIDING: "sliding"}


def shortest_pattern(names: Sequence[str]) -> str:
    """Return the pattern of the fewest blocks that gives these mixers when it is repeated."""
    number = next(n for n in range(1, len(names) + 1) if names[n:] == names[: len(names) - n])
    return ", ".join(names[:number])


def values_of_layers(ours: ModelConfig, path: str) -> list[Any]:
    """Return a value of each layer of the decoder: that of its mixer, or else the one at ``path``.

    The mixer has it under the last name of the path (``window`` of ``attention.window``).
    """
    stack, name = ours.decoder, path.rpartition(".")[2]
    mixers = (ours.mixers_of_layer(stack, layer=i)[0] for i in range(stack.layers))
    own = [field_of(mixer, name) for mixer in mixers]
    return [field_of(ours, path) if is_absent(one) or one is None else one for one in own]


@dataclass(frozen=True)
class SparseLayers(ConfigEntry):
    """``decoder_sparse_step`` and ``mlp_only_layers``: which layers have experts (Qwen)."""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        dense, step = set(theirs.get("mlp_only_layers") or ()), theirs.get("decoder_sparse_step", 1)
        layers = range(theirs.get("num_hidden_layers", 0))
        sparse = [i for i in layers if i not in dense and step and (i + 1) % step == 0]
        return {"decoder.sparse_layers": None if sparse == list(layers) else sparse}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        sparse = ours.decoder.moe_layers
        dense = [layer for layer in range(ours.decoder.layers) if layer not in sparse]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


@dataclass(frozen=True)
class SwitchedQKNorm(ConfigEntry):
    """``use_qk_norm``: a norm of queries and keys, with the epsilon of the other norms."""

    norm: Callable[[float], QKNorm]  # of its epsilon
    default: bool
    epsilon: float

    def read(self, theirs: Theirs) -> dict[str, Any]:
        norm = self.norm(theirs.get("rms_norm_eps") or self.epsilon)
        used = theirs.get("use_qk_norm", self.default)
        return {"attention.qk_norm": norm if used else NoQKNorm()}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        return {"use_qk_norm": not isinstance(ours.attention.qk_norm, NoQKNorm)}


@dataclass(frozen=True)
class SharedWidth(ConfigEntry):
    """``shared_expert_intermediate_size``: as wide as several experts (Qwen2-MoE)."""

    key: ClassVar[str] = "shared_expert_intermediate_size"

    def read(self, theirs: Theirs) -> dict[str, Any]:
        width, hidden = theirs.get(self.key), theirs.get("moe_intermediate_size")
        if not isinstance(width, int) or not isinstance(hidden, int) or width % max(hidden, 1):
            found = f"{self.key}: found {show_value(width)}"
            raise ConfigError([f"{found}, expected a multiple of moe_intermediate_size={hidden}"])
        return {"moe.shared_experts.number": width // hidden}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        number, hidden = field_of(ours, "moe.shared_experts.number"), field_of(ours, "moe.hidden")
        return {} if is_absent(number) else {self.key: number * hidden}


@dataclass(frozen=True)
class BalanceLoss(ConfigEntry):
    """``router_aux_loss_coef`` of transformers: k times the weight of ``SwitchBalance``.

    ``before`` are the other terms of the family, ``chosen`` is its key of k.
    """

    default: float = 0.001
    before: tuple[Balance, ...] = ()
    chosen: str = "num_experts_per_tok"

    def read(self, theirs: Theirs) -> dict[str, Any]:
        weight = theirs.get("router_aux_loss_coef", self.default)
        k = theirs.get(self.chosen) or 1
        terms = (*self.before, SwitchBalance(weight=weight * k)) if weight else self.before
        return {"moe.balance": [term.to_dict() for term in terms]}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        k = field_of(ours, "moe.select.k")
        if not isinstance(ours.moe, MoE) or is_absent(k):
            return {}
        weights = [term.weight / k for term in ours.moe.balance if isinstance(term, SwitchBalance)]
        return {"router_aux_loss_coef": weights[0] if weights else 0.0}
