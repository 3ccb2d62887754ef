"""DeepSeek families: latent attention, expert groups, shared experts and dense first layers."""

from dataclasses import dataclass
from typing import Any

from moesaic.core.config_errors import show_value
from moesaic.core.errors import ConfigError
from moesaic.exchange.config_entries import RotaryPositions
from moesaic.exchange.config_mapping import (
    ConfigEntry,
    ConfigMapping,
    FixedKey,
    Key,
    Theirs,
    field_of,
)
from moesaic.exchange.decoder_families import (
    CHOSEN,
    FUSED_EXPERTS,
    HIDDEN,
    INVERSE_FREQUENCIES,
    LAYER,
    LLAMA_TENSORS,
    NO_BIAS,
    OURS,
    QWEN_EXPERTS,
    ROUTED,
    SIZES,
    SPARSE_MODEL,
    TIED,
    epsilon,
    normalised,
    projections,
    shared_tensors,
)
from moesaic.exchange.family import FUSED, PER_EXPERT, Family
from moesaic.exchange.tensor_table import Rows, TensorTable
from moesaic.model.config import ModelConfig
from moesaic.moe.auxiliary_losses import SequenceBalance, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_selection import AllExperts, SigmoidTopK, TopGroups, TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.latent_attention import LatentAttention
from moesaic.nn.positional_encoding import Rotary

GREEDY, LIMITED = "greedy", "group_limited_greedy"


@dataclass(frozen=True)
class ExpertGroupKeys(ConfigEntry):
    """``n_group`` and ``topk_group``; ``methods`` are the values of ``topk_method`` that we have.

    A group's score is the sum of its ``experts_per_score`` highest ones.
    """

    experts_per_score: int
    methods: tuple[str, ...]

    def read(self, theirs: Theirs) -> dict[str, Any]:
        method, groups = theirs.get("topk_method") or self.methods[0], theirs.get("n_group") or 1
        if method not in self.methods:
            known = ", ".join(self.methods)
            raise ConfigError([f"topk_method: found {show_value(method)}, expected {known}"])
        if method == GREEDY or groups == 1:
            return {"moe.select.expert_groups": AllExperts()}
        kept = theirs.get("topk_group") or groups
        chosen = TopGroups(
            num_groups=groups, top_groups=kept, experts_per_score=self.experts_per_score
        )
        return {"moe.select.expert_groups": chosen}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        groups, method = field_of(ours, "moe.select.expert_groups"), self.methods[0]
        if not isinstance(groups, TopGroups):
            return {"topk_method": method, "n_group": 1, "topk_group": 1}
        keys = {"n_group": groups.num_groups, "topk_group": groups.top_groups}
        return {"topk_method": self.methods[-1]} | keys


@dataclass(frozen=True)
class FirstDenseLayers(ConfigEntry):
    """``first_k_dense_replace``: the layers from this one on have experts."""

    default: int = 0

    def read(self, theirs: Theirs) -> dict[str, Any]:
        found = theirs.get("first_k_dense_replace", self.default)
        return {"decoder.first_dense_layers": found or 0}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        return {"first_k_dense_replace": ours.decoder.layers - len(ours.decoder.moe_layers)}


@dataclass(frozen=True)
class SequenceBalanceLoss(ConfigEntry):
    """``aux_loss_alpha``, of each sequence or (without ``seq_aux``) of the batch."""

    default: float

    def read(self, theirs: Theirs) -> dict[str, Any]:
        weight, each = theirs.get("aux_loss_alpha", self.default), theirs.get("seq_aux", True)
        if not weight:
            return {"moe.balance": []}
        loss = SequenceBalance(weight=weight) if each else SwitchBalance(weight=weight)
        return {"moe.balance": [loss.to_dict()]}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        terms = ours.moe.balance if isinstance(ours.moe, MoE) else ()
        losses = [x for x in terms if isinstance(x, SequenceBalance | SwitchBalance)]
        if not losses:
            return {"aux_loss_alpha": 0.0}
        each = isinstance(losses[0], SequenceBalance)
        return {"aux_loss_alpha": losses[0].weight, "seq_aux": each}


CORRECTION = f"{ROUTED}router.balance0_bias"  # of scores, by ``BiasUpdate``
CORRECTION_IN_GATE = Rows(f"{LAYER}mlp.gate.e_score_correction_bias")
_LATENT = "mixers.attention."
_MIXER = f"{OURS}latent_attention."
_TENSORS: TensorTable = {
    **LLAMA_TENSORS,
    f"{_MIXER}norm.weight": Rows(f"{LAYER}input_layernorm.weight"),
    f"{_MIXER}inner.query_down.weight": projections("q_a_proj", of="self_attn"),
    f"{_MIXER}inner.query_norm.weight": projections("q_a_layernorm", of="self_attn"),
    f"{_MIXER}inner.query_up.weight": projections("q_b_proj", of="self_attn"),
    f"{_MIXER}inner.kv_down.weight": projections("kv_a_proj_with_mqa", of="self_attn"),
    f"{_MIXER}inner.kv_norm.weight": projections("kv_a_layernorm", of="self_attn"),
    f"{_MIXER}inner.kv_up.weight": projections("kv_b_proj", of="self_attn"),
    f"{_MIXER}inner.out.weight": projections("o_proj", of="self_attn"),
    CORRECTION: CORRECTION_IN_GATE,
    **shared_tensors("mlp.shared_experts"),
}
_MODEL = SPARSE_MODEL.replace(
    mixers={"attention": LatentAttention()}, position=Rotary(pairing="neighbouring")
)
_ENTRIES: tuple[ConfigEntry, ...] = (
    *SIZES,
    HIDDEN,
    CHOSEN,
    NO_BIAS,
    Key("n_routed_experts", "moe.experts", also="num_local_experts"),
    Key("moe_intermediate_size", "moe.hidden"),
    Key("n_shared_experts", "moe.shared_experts.number"),
    Key("routed_scaling_factor", "moe.select.scale", default=1.0),
    Key("q_lora_rank", f"{_LATENT}query_rank", default=None),
    Key("kv_lora_rank", f"{_LATENT}kv_rank"),
    Key("qk_nope_head_dim", f"{_LATENT}nope_dim"),
    Key("qk_rope_head_dim", f"{_LATENT}rope_dim"),
    Key("v_head_dim", f"{_LATENT}value_dim"),
    FixedKey("moe_layer_freq", 1),
    epsilon(),
    RotaryPositions(scales_scores=True),
    FirstDenseLayers(),
)
# multi-token prediction is not read: its tensors are refused, or dropped on request
NO_PREDICTED_TOKENS = tuple(
    FixedKey(key, 0, same=(1,)) for key in ("num_nextn_predict_layers", "num_mtp_layers")
)
_OTHER = frozenset({"ep_size", "qk_head_dim"})


def _query_tensors(model: ModelConfig) -> TensorTable:
    """Return the rule of queries without a latent (DeepSeek-V2-Lite)."""
    if field_of(model, f"{_LATENT}query_rank") is not None:
        return {}
    return {f"{_MIXER}inner.query_up.weight": projections("q_proj", of="self_attn")}


def _deepseek(model_type: str, architecture: str, mapping: ConfigMapping) -> Family:
    return Family(
        model_type,
        architecture,
        mapping,
        {PER_EXPERT: {**_TENSORS, **QWEN_EXPERTS}, FUSED: {**_TENSORS, **FUSED_EXPERTS}},
        copies=TIED,
        derived=INVERSE_FREQUENCIES,
        variants=_query_tensors,
    )


DEEPSEEK_V2 = _deepseek(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    ConfigMapping(
        _MODEL.replace(
            moe=_MODEL.moe.replace(
                select=TopK(k=1, normalise="none"), shared_experts=SharedExperts()
            )
        ),
        (
            *_ENTRIES,
            ExpertGroupKeys(experts_per_score=1, methods=(GREEDY, LIMITED)),
            SequenceBalanceLoss(default=0.001),
            FixedKey("norm_topk_prob", value=False),
            FixedKey("scoring_func", "softmax"),
            FixedKey("mlp_bias", value=False),
        ),
        _OTHER,
    ),
)
DEEPSEEK_V3 = _deepseek(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    ConfigMapping(
        _MODEL.replace(
            moe=_MODEL.moe.replace(
                select=SigmoidTopK(k=1), shared_experts=SharedExperts(), balance=(BiasUpdate(),)
            )
        ),
        (
            *_ENTRIES,
            ExpertGroupKeys(experts_per_score=2, methods=("noaux_tc",)),
            normalised(default=False),
            Key(
                "rope_interleave",
                "position.pairing",
                default=True,
                values={True: "neighbouring", False: "halves"},
            ),
            FixedKey("scoring_func", "sigmoid"),
            *NO_PREDICTED_TOKENS,
        ),
        _OTHER | {"aux_loss_alpha", "seq_aux"},
    ),
)
