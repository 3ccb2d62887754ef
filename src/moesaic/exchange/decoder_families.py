"""Decoder families: Llama and its relatives, dense and with experts, as data."""

from moesaic.exchange.config_entries import (
    BalanceLoss,
    RotaryPositions,
    SharedWidth,
    SparseLayers,
    Windows,
    alternating_windows_below,
    windows_above,
)
from moesaic.exchange.config_mapping import ConfigEntry, ConfigMapping, FixedKey, Key
from moesaic.exchange.family import DENSE, FUSED, PER_EXPERT, PUBLISHED, Family
from moesaic.exchange.tensor_table import ExpertMatrices, FusedExperts, Rows, TensorTable
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.shared_experts import GatedSharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import AcrossHeadsQKNorm, PerHeadQKNorm

LLAMA_MODEL = ModelConfig(  # every number is a key of theirs
    dim=8,
    encoder=Stack(layers=0),
    decoder=Stack(layers=1, moe_every=0),
    attention=AttentionConfig(heads=1),
    feed_forward=FeedForwardConfig(hidden=1),
    moe=NoMoE(),
    position=Rotary(pairing="halves"),
    embedding=EmbeddingConfig(tied=False, scaled=False),
)
SPARSE_MODEL = LLAMA_MODEL.replace(
    decoder=Stack(layers=1, moe_every=1), moe=MoE(experts=8, hidden=1, select=TopK(k=1))
)

SIZES_TIED_OR_NOT: tuple[ConfigEntry, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "dim"),
    Key("num_hidden_layers", "decoder.layers"),
    Key("num_attention_heads", "attention.heads"),
    Key("num_key_value_heads", "attention.kv_heads", default=None),
    Key("attention_dropout", "dropout", default=0.0, values={0.0: 0.0}),
    FixedKey("hidden_act", "silu", same=("swish",)),
)
SIZES: tuple[ConfigEntry, ...] = (
    *SIZES_TIED_OR_NOT,
    Key("tie_word_embeddings", "embedding.tied", default=False),
)
HEAD_DIM = Key("head_dim", "attention.head_dim", default=None)
HIDDEN = Key("intermediate_size", "feed_forward.hidden")
EXPERTS_AS_WIDE = Key("intermediate_size", ("moe.hidden", "feed_forward.hidden"))
_EXPERTS = Key("num_experts", "moe.experts", also="num_local_experts")
LOCAL_EXPERTS = Key("num_local_experts", "moe.experts", also="num_experts")
CHOSEN = Key("num_experts_per_tok", "moe.select.k")
NO_BIAS = FixedKey("attention_bias", value=False)
_QKV = ("query", "key", "value")


def normalised(*, default: bool) -> Key:
    """Return the entry of whether the weights of chosen experts are normalised."""
    values = {True: "before", False: "none"}
    return Key("norm_topk_prob", "moe.select.normalise", default=default, values=values)


def qkv_bias(key: str, *, default: bool) -> Key:
    """Return the entry of whether queries, keys and values have biases."""
    return Key(key, "attention.bias", default=default, values={True: _QKV, False: ()})


def epsilon(*paths: str, default: float = 1e-6) -> Key:
    """Return the entry of the epsilon of norms, of others at ``paths`` too."""
    return Key("rms_norm_eps", ("norm.eps", *paths), default=default)


_PER_HEAD_NORM = AttentionConfig(heads=1, qk_norm=PerHeadQKNorm())
LAYER, OURS = "model.layers.{layer}.", "decoder.{layer}."
ATTENTION, FEED_FORWARD = OURS + "self_attention.", OURS + "feed_forward."
GATE_AND_UP = ("gate_proj", "up_proj")


def projections(*names: str, of: str, kind: str = "weight") -> Rows:
    """Return the rule of linear maps of a layer that are one of ours."""
    return Rows(*(f"{LAYER}{of}.{name}.{kind}" for name in names))


LLAMA_TENSORS: TensorTable = {
    "embedding.weight": Rows("model.embed_tokens.weight"),
    "embedding.output": Rows("lm_head.weight"),
    "decoder_norm.weight": Rows("model.norm.weight"),
    f"{ATTENTION}norm.weight": Rows(f"{LAYER}input_layernorm.weight"),
    f"{ATTENTION}inner.qkv.weight": projections("q_proj", "k_proj", "v_proj", of="self_attn"),
    f"{ATTENTION}inner.out.weight": projections("o_proj", of="self_attn"),
    f"{FEED_FORWARD}norm.weight": Rows(f"{LAYER}post_attention_layernorm.weight"),
    f"{FEED_FORWARD}inner.up.weight": projections(*GATE_AND_UP, of="mlp"),
    f"{FEED_FORWARD}inner.down.weight": projections("down_proj", of="mlp"),
}
QKV_BIAS: TensorTable = {
    f"{ATTENTION}inner.qkv.bias": projections(
        "q_proj", "k_proj", "v_proj", of="self_attn", kind="bias"
    )
}
QK_NORMS: TensorTable = {
    f"{ATTENTION}inner.qk_norm.query.weight": projections("q_norm", of="self_attn"),
    f"{ATTENTION}inner.qk_norm.key.weight": projections("k_norm", of="self_attn"),
}
ROUTED = f"{FEED_FORWARD}inner."
QWEN_EXPERTS: TensorTable = {
    f"{ROUTED}router.gate.weight": Rows(f"{LAYER}mlp.gate.weight"),
    f"{ROUTED}experts.up": ExpertMatrices(
        *(f"{LAYER}mlp.experts.{{expert}}.{name}.weight" for name in GATE_AND_UP)
    ),
    f"{ROUTED}experts.down": ExpertMatrices(f"{LAYER}mlp.experts.{{expert}}.down_proj.weight"),
}
_SPARSE_LAYER = f"{LAYER}block_sparse_moe."
MIXTRAL_EXPERTS: TensorTable = {
    f"{ROUTED}router.gate.weight": Rows(f"{_SPARSE_LAYER}gate.weight"),
    f"{ROUTED}experts.up": ExpertMatrices(
        f"{_SPARSE_LAYER}experts.{{expert}}.w1.weight",
        f"{_SPARSE_LAYER}experts.{{expert}}.w3.weight",
    ),
    f"{ROUTED}experts.down": ExpertMatrices(f"{_SPARSE_LAYER}experts.{{expert}}.w2.weight"),
}
FUSED_EXPERTS: TensorTable = {  # what transformers 5 has in memory, of both
    f"{ROUTED}router.gate.weight": Rows(f"{LAYER}mlp.gate.weight"),
    f"{ROUTED}experts.up": FusedExperts(f"{LAYER}mlp.experts.gate_up_proj"),
    f"{ROUTED}experts.down": FusedExperts(f"{LAYER}mlp.experts.down_proj"),
}
SHARED = f"{ROUTED}shared_experts."


def shared_tensors(of: str) -> TensorTable:
    """Return the rules of the shared experts, which theirs has as one feed-forward ``of``."""
    return {
        f"{SHARED}feed_forward.up.weight": projections(*GATE_AND_UP, of=of),
        f"{SHARED}feed_forward.down.weight": projections("down_proj", of=of),
    }


SHARED_EXPERT: TensorTable = {
    **shared_tensors("mlp.shared_expert"),
    f"{SHARED}gate.weight": Rows(f"{LAYER}mlp.shared_expert_gate.weight"),
}
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
INVERSE_FREQUENCIES = (r".*\.rotary_emb\.inv_freq",)


def llama_like(
    model_type: str, architecture: str, mapping: ConfigMapping, layouts: dict[str, TensorTable]
) -> Family:
    """Return a family whose attention has the names of Llama's."""
    return Family(
        model_type,
        architecture,
        mapping,
        layouts,
        copies=TIED,
        derived=INVERSE_FREQUENCIES,
        rotated=r".*\.self_attn\.[qk]_(proj|norm)\.(weight|bias)",
    )


MIXTRAL = llama_like(
    "mixtral",
    "MixtralForCausalLM",
    ConfigMapping(
        SPARSE_MODEL,
        (
            *SIZES,
            HEAD_DIM,
            EXPERTS_AS_WIDE,
            LOCAL_EXPERTS,
            CHOSEN,
            epsilon(default=1e-5),
            RotaryPositions(theta=1e6),
            Windows(),
            BalanceLoss(),
            FixedKey("router_jitter_noise", 0.0),
        ),
    ),
    {PER_EXPERT: LLAMA_TENSORS | MIXTRAL_EXPERTS, FUSED: LLAMA_TENSORS | FUSED_EXPERTS},
)
QWEN3_MOE = llama_like(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    ConfigMapping(
        SPARSE_MODEL.replace(attention=_PER_HEAD_NORM),
        (
            *SIZES,
            HEAD_DIM,
            HIDDEN,
            _EXPERTS,
            CHOSEN,
            normalised(default=False),
            Key("moe_intermediate_size", "moe.hidden"),
            epsilon("attention.qk_norm.norm.eps"),
            RotaryPositions(),
            Windows("use_sliding_window"),
            SparseLayers(),
            BalanceLoss(),
            NO_BIAS,
        ),
        frozenset({"max_window_layers"}),
    ),
    {
        PER_EXPERT: LLAMA_TENSORS | QK_NORMS | QWEN_EXPERTS,
        FUSED: LLAMA_TENSORS | QK_NORMS | FUSED_EXPERTS,
    },
)
QWEN2_MOE = llama_like(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    ConfigMapping(
        SPARSE_MODEL.replace(
            moe=MoE(experts=8, hidden=1, select=TopK(k=1), shared_experts=GatedSharedExperts())
        ),
        (
            *SIZES,
            HIDDEN,
            _EXPERTS,
            CHOSEN,
            normalised(default=False),
            Key("moe_intermediate_size", "moe.hidden"),
            qkv_bias("qkv_bias", default=True),
            SharedWidth(),
            epsilon(),
            RotaryPositions(),
            Windows("use_sliding_window", alternating_windows_below),
            SparseLayers(),
            BalanceLoss(),
        ),
        frozenset({"max_window_layers"}),
    ),
    {
        PER_EXPERT: LLAMA_TENSORS | QKV_BIAS | QWEN_EXPERTS | SHARED_EXPERT,
        FUSED: LLAMA_TENSORS | QKV_BIAS | FUSED_EXPERTS | SHARED_EXPERT,
    },
)
OLMOE = llama_like(
    "olmoe",
    "OlmoeForCausalLM",
    ConfigMapping(
        SPARSE_MODEL.replace(attention=AttentionConfig(heads=1, qk_norm=AcrossHeadsQKNorm())),
        (
            *SIZES,
            EXPERTS_AS_WIDE,
            _EXPERTS,
            CHOSEN,
            normalised(default=False),
            Key("clip_qkv", "attention.clip", default=None),
            epsilon("attention.qk_norm.norm.eps", default=1e-5),
            RotaryPositions(),
            BalanceLoss(0.01),
            NO_BIAS,
        ),
    ),
    {
        PER_EXPERT: LLAMA_TENSORS | QK_NORMS | QWEN_EXPERTS,
        FUSED: LLAMA_TENSORS | QK_NORMS | FUSED_EXPERTS,
    },
)
_GRANITE = (
    NO_BIAS,
    Key("embedding_multiplier", "embedding.multiplier", default=1.0),
    Key("logits_scaling", "embedding.logits_scaling", default=1.0),
    Key("residual_multiplier", "block_layout.residual_multiplier", default=1.0),
    Key("attention_multiplier", "attention.scale", default=1.0),
)


def _granite_tensors(router: str, up: str, down: str) -> TensorTable:
    return {
        **LLAMA_TENSORS,
        f"{ROUTED}router.gate.weight": Rows(_SPARSE_LAYER + router),
        f"{ROUTED}experts.up": FusedExperts(_SPARSE_LAYER + up),
        f"{ROUTED}experts.down": FusedExperts(_SPARSE_LAYER + down),
    }


GRANITE_MOE = llama_like(
    "granitemoe",
    "GraniteMoeForCausalLM",
    ConfigMapping(
        SPARSE_MODEL,
        (
            *SIZES,
            EXPERTS_AS_WIDE,
            LOCAL_EXPERTS,
            CHOSEN,
            epsilon(),
            RotaryPositions(),
            BalanceLoss(),
            *_GRANITE,
        ),
    ),
    {
        PUBLISHED: _granite_tensors(
            "router.layer.weight", "input_linear.weight", "output_linear.weight"
        ),
        FUSED: _granite_tensors("router.weight", "experts.gate_up_proj", "experts.down_proj"),
    },
)
_DENSE_SIZES = (*SIZES, HIDDEN, epsilon(), RotaryPositions())
LLAMA = llama_like(
    "llama",
    "LlamaForCausalLM",
    ConfigMapping(
        LLAMA_MODEL, (*_DENSE_SIZES, HEAD_DIM, NO_BIAS, FixedKey("mlp_bias", value=False))
    ),
    {DENSE: LLAMA_TENSORS},
)
GRANITE = llama_like(
    "granite",
    "GraniteForCausalLM",
    ConfigMapping(LLAMA_MODEL, (*_DENSE_SIZES, FixedKey("mlp_bias", value=False), *_GRANITE)),
    {DENSE: LLAMA_TENSORS},
)
MISTRAL = llama_like(
    "mistral",
    "MistralForCausalLM",
    ConfigMapping(LLAMA_MODEL, (*_DENSE_SIZES, HEAD_DIM, Windows())),
    {DENSE: LLAMA_TENSORS},
)
QWEN2 = llama_like(
    "qwen2",
    "Qwen2ForCausalLM",
    ConfigMapping(
        LLAMA_MODEL.replace(attention=AttentionConfig(heads=1, bias=_QKV)),
        (*_DENSE_SIZES, Windows("use_sliding_window", windows_above)),
        frozenset({"max_window_layers"}),
    ),
    {DENSE: LLAMA_TENSORS | QKV_BIAS},
)
QWEN3 = llama_like(
    "qwen3",
    "Qwen3ForCausalLM",
    ConfigMapping(
        LLAMA_MODEL.replace(attention=_PER_HEAD_NORM),
        (
            *SIZES,
            HIDDEN,
            Key("head_dim", "attention.head_dim", default=128),
            epsilon("attention.qk_norm.norm.eps"),
            RotaryPositions(),
            Windows("use_sliding_window", windows_above),
            NO_BIAS,
        ),
        frozenset({"max_window_layers"}),
    ),
    {DENSE: LLAMA_TENSORS | QK_NORMS},
)
