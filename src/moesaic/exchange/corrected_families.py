"""Families whose routers select by corrected scores: GLM-4-MoE, MiniMax-M2 and ERNIE 4.5.

The correction is the bias of ``BiasUpdate``, as in DeepSeek-V3, with attention like Llama's.
"""

from dataclasses import dataclass
from typing import Any

from moesaic.exchange.config_entries import BalanceLoss, RotaryPositions, SwitchedQKNorm
from moesaic.exchange.config_mapping import ConfigEntry, ConfigMapping, FixedKey, Key, Theirs
from moesaic.exchange.decoder_families import (
    CHOSEN,
    EXPERTS_AS_WIDE,
    FUSED_EXPERTS,
    HEAD_DIM,
    HIDDEN,
    LAYER,
    LLAMA_TENSORS,
    LOCAL_EXPERTS,
    MIXTRAL_EXPERTS,
    QK_NORMS,
    QKV_BIAS,
    QWEN_EXPERTS,
    SIZES,
    SIZES_TIED_OR_NOT,
    SPARSE_MODEL,
    epsilon,
    llama_like,
    normalised,
    qkv_bias,
    shared_tensors,
)
from moesaic.exchange.deepseek_families import (
    CORRECTION,
    CORRECTION_IN_GATE,
    NO_PREDICTED_TOKENS,
    ExpertGroupKeys,
    FirstDenseLayers,
)
from moesaic.exchange.family import FUSED, PER_EXPERT
from moesaic.exchange.tensor_table import Rows, RowVector, TensorTable
from moesaic.model.config import ModelConfig
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_selection import Select, SigmoidTopK, TopK
from moesaic.moe.shared_experts import NoSharedExperts, SharedExpertBranch, SharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.norm import RMSNorm
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import AcrossHeadsQKNorm, PerHeadQKNorm


def _model(select: Select, shared_experts: SharedExpertBranch) -> ModelConfig:
    moe = SPARSE_MODEL.moe.replace(
        select=select, balance=(BiasUpdate(),), shared_experts=shared_experts
    )
    return SPARSE_MODEL.replace(moe=moe)


_GLM_TENSORS: TensorTable = {
    **LLAMA_TENSORS,
    **QKV_BIAS,
    **QK_NORMS,
    **shared_tensors("mlp.shared_experts"),
    CORRECTION: CORRECTION_IN_GATE,
}
GLM4_MOE = llama_like(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    ConfigMapping(
        _model(SigmoidTopK(k=1), SharedExperts()),
        (
            *SIZES,
            HEAD_DIM,
            HIDDEN,
            CHOSEN,
            normalised(default=True),
            qkv_bias("attention_bias", default=False),
            Key("n_routed_experts", "moe.experts", also="num_local_experts"),
            Key("moe_intermediate_size", "moe.hidden"),
            Key("n_shared_experts", "moe.shared_experts.number", default=1),
            Key("routed_scaling_factor", "moe.select.scale", default=1.0),
            epsilon(default=1e-5),
            SwitchedQKNorm(
                lambda eps: PerHeadQKNorm(norm=RMSNorm(eps=eps)), default=False, epsilon=1e-5
            ),
            RotaryPositions(fraction=0.5),
            FirstDenseLayers(default=1),
            ExpertGroupKeys(experts_per_score=2, methods=("noaux_tc",)),
            *NO_PREDICTED_TOKENS,
        ),
        frozenset({"partial_rotary_factor"}),
    ),
    {
        PER_EXPERT: {**_GLM_TENSORS, **QWEN_EXPERTS},
        FUSED: {**_GLM_TENSORS, **FUSED_EXPERTS},
    },
)
_MINIMAX_TENSORS: TensorTable = {**LLAMA_TENSORS, **QK_NORMS}
MINIMAX_M2 = llama_like(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    ConfigMapping(
        _model(SigmoidTopK(k=1), NoSharedExperts()).replace(
            attention=AttentionConfig(heads=1, qk_norm=AcrossHeadsQKNorm())
        ),
        (
            *SIZES,
            HEAD_DIM,
            EXPERTS_AS_WIDE,
            LOCAL_EXPERTS,
            CHOSEN,
            epsilon("attention.qk_norm.norm.eps"),
            RotaryPositions(theta=5e6, fraction=1.0),
            BalanceLoss(before=(BiasUpdate(),)),
            FixedKey("router_jitter_noise", 0.0),
            FixedKey("scoring_func", "sigmoid"),
        ),
        frozenset({"rotary_dim", "partial_rotary_factor"}),
    ),
    {
        PER_EXPERT: {
            **_MINIMAX_TENSORS,
            **MIXTRAL_EXPERTS,
            CORRECTION: Rows(f"{LAYER}block_sparse_moe.e_score_correction_bias"),
        },
        FUSED: {
            **_MINIMAX_TENSORS,
            **FUSED_EXPERTS,
            CORRECTION: Rows(f"{LAYER}mlp.e_score_correction_bias"),
        },
    },
)
_START, _END, _EVERY = (f"moe_layer_{name}" for name in ("start_index", "end_index", "interval"))


@dataclass(frozen=True)
class SparseLayersFromTo(ConfigEntry):
    """``moe_layer_start_index``, ``..._end_index`` and ``..._interval`` (ERNIE 4.5)."""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        layers, end = theirs.get("num_hidden_layers", 0), theirs.get(_END, -1)
        start, every = theirs.get(_START, 1), theirs.get(_EVERY, 1)
        found = range(start, layers if end == -1 else min(end + 1, layers))
        return {"decoder.sparse_layers": [i for i in found if (i + 1) % every == 0]}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        layers = ours.decoder.layers
        sparse = list(ours.decoder.moe_layers) or [layers]
        every = sparse[1] - sparse[0] if len(sparse) > 1 else 1
        return {_START: sparse[0], _END: min(sparse[-1], layers - 1), _EVERY: every}


def _ernie_tensors(correction: str) -> TensorTable:
    return {
        **LLAMA_TENSORS,
        **shared_tensors("mlp.shared_experts"),
        CORRECTION: RowVector(f"{LAYER}mlp.{correction}.e_score_correction_bias"),
    }


ERNIE4_5_MOE = llama_like(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    ConfigMapping(
        _model(TopK(k=1, scores="probabilities"), SharedExperts()).replace(
            position=Rotary(pairing="neighbouring")
        ),
        (
            *SIZES_TIED_OR_NOT,
            Key("tie_word_embeddings", "embedding.tied", default=True),
            HEAD_DIM,
            HIDDEN,
            Key("moe_num_experts", "moe.experts", also="num_experts"),
            Key("moe_k", "moe.select.k", default=6, also="num_experts_per_tok"),
            Key("moe_num_shared_experts", "moe.shared_experts.number", default=2),
            Key("moe_intermediate_size", "moe.hidden"),
            epsilon(default=1e-5),
            RotaryPositions(theta=5e5),
            SparseLayersFromTo(),
            BalanceLoss(before=(BiasUpdate(),), chosen="moe_k"),
            FixedKey("moe_norm_min", 1e-12),
            FixedKey("use_bias", value=False),
        ),
    ),
    {
        PER_EXPERT: {**_ernie_tensors("moe_statics"), **QWEN_EXPERTS},
        FUSED: {**_ernie_tensors("gate.moe_statics"), **FUSED_EXPERTS},
    },
)
