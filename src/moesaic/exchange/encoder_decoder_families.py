"""Encoder-decoder families: M2M-100 and NLLB, T5 and Switch, dense and with experts, as data."""

from moesaic.data.language_tag import FirstTargetToken, NoTag
from moesaic.exchange.config_mapping import ConfigEntry, ConfigMapping, EqualKeys, FixedKey, Key
from moesaic.exchange.encoder_decoder_entries import (
    NllbRouting,
    PositionsBehindPadding,
    RouterLosses,
    StackLayers,
    TiedTable,
    every_nth,
    second_of_step,
)
from moesaic.exchange.family import DENSE, PER_EXPERT, Family
from moesaic.exchange.tensor_table import (
    ExpertMatrices,
    ExpertVectors,
    GatedRows,
    Rows,
    TensorRule,
    TensorTable,
)
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.auxiliary_losses import FirstChoiceBalance, SequenceBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity, PositionPriority, RowCapacity
from moesaic.moe.expert_selection import SwitchTop1, Top2
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import (
    GEGLU,
    GELU,
    FeedForwardConfig,
    ReGLU,
    ReLU,
    SwiGLU,
    TanhGELU,
)
from moesaic.nn.norm import LayerNorm, RMSNorm
from moesaic.nn.positional_encoding import RelativeBias, Sinusoidal

_ONE_LAYER = Stack(layers=1, moe_every=0)
_ACTIVATIONS = {"relu": ReLU(), "gelu": GELU(), "gelu_new": TanhGELU()}
M2M_MODEL = ModelConfig(  # every number is a key of theirs
    dim=8,
    encoder=_ONE_LAYER,
    decoder=_ONE_LAYER,
    attention=AttentionConfig(heads=1),
    feed_forward=FeedForwardConfig(hidden=1, activation=ReLU()),
    norm=LayerNorm(bias=True),
    position=Sinusoidal(offset=2),
    bias=True,
)
T5_MODEL = ModelConfig(
    dim=8,
    encoder=_ONE_LAYER,
    decoder=_ONE_LAYER,
    attention=AttentionConfig(heads=1, scale=1.0),
    feed_forward=FeedForwardConfig(hidden=1, activation=ReLU()),
    norm=RMSNorm(),
    position=RelativeBias(),
    embedding=EmbeddingConfig(scaled=False),
)

_QKV, _KV = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj")
_STACKS = ("encoder", "decoder")


def _affine(ours: str, *theirs: str) -> dict[str, TensorRule]:
    return {
        f"{ours}.{kind}": Rows(*(f"{name}.{kind}" for name in theirs))
        for kind in ("weight", "bias")
    }


def _m2m_attention(ours: str, theirs: str) -> dict[str, TensorRule]:
    joined = ("qkv", _QKV) if "self_attn" in theirs else ("kv", _KV)
    alone = {} if joined[0] == "qkv" else _affine(f"{ours}.inner.query", f"{theirs}.q_proj")
    return {
        **_affine(f"{ours}.norm", f"{theirs}_layer_norm"),
        **_affine(f"{ours}.inner.{joined[0]}", *(f"{theirs}.{name}" for name in joined[1])),
        **alone,
        **_affine(f"{ours}.inner.out", f"{theirs}.out_proj"),
    }


def _m2m_tensors(*, cross: str, feed_forward: str, norm: str) -> TensorTable:
    """Return the table of a model whose modules have these names."""
    table: dict[str, TensorRule] = {"embedding.weight": Rows("model.shared.weight")}
    for side in _STACKS:
        ours, theirs = f"{side}.{{layer}}.", f"model.{side}.layers.{{layer}}."
        table |= _m2m_attention(f"{ours}self_attention", f"{theirs}self_attn")
        table |= _affine(f"{ours}feed_forward.norm", f"{theirs}{norm}")
        table |= _affine(f"{ours}feed_forward.inner.up", f"{theirs}{feed_forward}fc1")
        table |= _affine(f"{ours}feed_forward.inner.down", f"{theirs}{feed_forward}fc2")
        table |= _affine(f"{side}_norm", f"model.{side}.layer_norm")
    decoder = "model.decoder.layers.{layer}."
    return table | _m2m_attention("decoder.{layer}.cross_attention", f"{decoder}{cross}")


def _nllb_experts() -> TensorTable:
    table: dict[str, TensorRule] = {}
    for side in _STACKS:
        ours, theirs = (
            f"{side}.{{layer}}.feed_forward.inner.",
            f"model.{side}.layers.{{layer}}.ffn.",
        )
        table[f"{ours}router.gate.weight"] = Rows(f"{theirs}router.classifier.weight")
        for mine, yours in (("up", "fc1"), ("down", "fc2")):
            one = f"{theirs}experts.expert_{{expert}}.{yours}"
            table[f"{ours}experts.{mine}"] = ExpertMatrices(f"{one}.weight")
            table[f"{ours}experts.{mine}_bias"] = ExpertVectors(f"{one}.bias")
    return table


def _t5_tensors(*, feed_forward: str) -> TensorTable:
    table: dict[str, TensorRule] = {
        "embedding.weight": Rows("shared.weight"),
        "embedding.output": Rows("lm_head.weight"),
    }
    for side in _STACKS:
        ours, block = f"{side}.{{layer}}.", f"{side}.block.{{layer}}.layer."
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        attention, last = f"{block}0.SelfAttention.", f"{block}{1 if side == 'encoder' else 2}."
        inner = f"{last}{feed_forward}."
        table |= {
            f"{side}_score_bias.table.weight": Rows(first),
            f"{ours}self_attention.norm.weight": Rows(f"{block}0.layer_norm.weight"),
            f"{ours}self_attention.inner.qkv.weight": Rows(
                *(f"{attention}{name}.weight" for name in "qkv")
            ),
            f"{ours}self_attention.inner.out.weight": Rows(f"{attention}o.weight"),
            f"{ours}feed_forward.norm.weight": Rows(f"{last}layer_norm.weight"),
            f"{ours}feed_forward.inner.up.weight": GatedRows(
                f"{inner}wi.weight", f"{inner}wi_0.weight", f"{inner}wi_1.weight"
            ),
            f"{ours}feed_forward.inner.down.weight": Rows(f"{inner}wo.weight"),
            f"{ours}feed_forward.inner.router.gate.weight": Rows(
                f"{inner}router.classifier.weight"
            ),
            f"{ours}feed_forward.inner.experts.up": ExpertMatrices(
                f"{inner}experts.expert_{{expert}}.wi.weight"
            ),
            f"{ours}feed_forward.inner.experts.down": ExpertMatrices(
                f"{inner}experts.expert_{{expert}}.wo.weight"
            ),
            f"{side}_norm.weight": Rows(f"{side}.final_layer_norm.weight"),
        }
    ours, theirs = "decoder.{layer}.cross_attention.", "decoder.block.{layer}.layer.1."
    return table | {
        f"{ours}norm.weight": Rows(f"{theirs}layer_norm.weight"),
        f"{ours}inner.query.weight": Rows(f"{theirs}EncDecAttention.q.weight"),
        f"{ours}inner.kv.weight": Rows(*(f"{theirs}EncDecAttention.{n}.weight" for n in "kv")),
        f"{ours}inner.out.weight": Rows(f"{theirs}EncDecAttention.o.weight"),
    }


_M2M_WIDTHS = ("encoder_ffn_dim", "decoder_ffn_dim")
_M2M_ENTRIES: tuple[ConfigEntry, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("d_model", "dim"),
    EqualKeys(("encoder_attention_heads", "decoder_attention_heads"), ("attention.heads",)),
    Key("activation_function", "feed_forward.activation", default="relu", values=_ACTIVATIONS),
    Key("scale_embedding", "embedding.scaled", default=True),
    Key("dropout", "dropout", default=0.1),
    FixedKey("tie_word_embeddings", value=True),
    PositionsBehindPadding(),
)
_M2M_OTHER = frozenset(
    """num_hidden_layers activation_dropout classifier_dropout encoder_layerdrop decoder_layerdrop
    init_std normalize_before normalize_embedding add_bias_logits add_final_layer_norm
    static_position_embeddings""".split()  # noqa: SIM905 - one line would be a page
)
_T5_ENTRIES: tuple[ConfigEntry, ...] = (
    Key("vocab_size", "vocab_size"),
    Key("d_model", "dim"),
    Key("d_kv", "attention.head_dim", default=64),
    Key("num_heads", "attention.heads"),
    Key("relative_attention_num_buckets", "position.buckets", default=32),
    Key("relative_attention_max_distance", "position.max_distance", default=128),
    Key("layer_norm_epsilon", "norm.eps", default=1e-6),
    Key("dropout_rate", "dropout", default=0.1),
    TiedTable(),
)
_T5_OTHER = frozenset(
    """num_sparse_encoder_layers num_sparse_decoder_layers scale_decoder_outputs
    classifier_dropout initializer_factor n_positions output_past is_decoder is_gated_act
    dense_act_fn router_jitter_noise router_ignore_padding_tokens add_router_probs d_inner
    encoder_sparse_step decoder_sparse_step add_cross_attention""".split()  # noqa: SIM905
)


def _tables_of(shared: str, output: str, side: str) -> dict[str, str]:
    sides = {f"{side}{name}.embed_tokens.weight": shared for name in _STACKS}
    return {output: shared, **sides}


_M2M_COPIES = _tables_of("model.shared.weight", "lm_head.weight", "model.")
_T5_COPIES = _tables_of("shared.weight", "lm_head.weight", "")
POSITIONS = (r"model\.(en|de)coder\.embed_positions\.weights?",)
# an untied table beside, which older versions stored and never read
_NEVER_READ = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)

M2M100 = Family(
    "m2m_100",
    "M2M100ForConditionalGeneration",
    ConfigMapping(
        M2M_MODEL,
        (
            *_M2M_ENTRIES,
            Key("encoder_layers", "encoder.layers"),
            Key("decoder_layers", "decoder.layers"),
            EqualKeys(_M2M_WIDTHS, ("feed_forward.hidden",)),
        ),
        _M2M_OTHER,
    ),
    {DENSE: _m2m_tensors(cross="encoder_attn", feed_forward="", norm="final_layer_norm")},
    copies=_M2M_COPIES,
    derived=POSITIONS,
    tag=FirstTargetToken(),
    fairseq_rows=True,
)
NLLB_MOE = Family(
    "nllb-moe",
    "NllbMoeForConditionalGeneration",
    ConfigMapping(
        M2M_MODEL.replace(
            moe=MoE(
                experts=2,
                select=Top2(normalise="after"),
                limit=Capacity(factor=1.0, minimum=0, priority=PositionPriority()),
                balance=(FirstChoiceBalance(),),
            )
        ),
        (
            *_M2M_ENTRIES,
            EqualKeys(_M2M_WIDTHS, ("feed_forward.hidden", "moe.hidden")),
            Key("num_experts", "moe.experts"),
            *(
                StackLayers(side, f"{side}_layers", f"{side}_sparse_step", 4, every_nth)
                for side in _STACKS
            ),
            NllbRouting(),
            RouterLosses(FirstChoiceBalance),
            FixedKey("router_bias", value=False),
            FixedKey("router_dtype", "float32"),
        ),
        _M2M_OTHER
        | {"expert_capacity", "router_ignore_padding_tokens", "router_z_loss_coef", "router_type"},
    ),
    {
        PER_EXPERT: {
            **_m2m_tensors(cross="cross_attention", feed_forward="ffn.", norm="ff_layer_norm"),
            **_nllb_experts(),
        }
    },
    copies=_M2M_COPIES,
    derived=POSITIONS,
    tag=FirstTargetToken(),
    fairseq_rows=True,
    transformers_note=(
        "transformers 5.24 uses experts 0 and 1 of NLLB-MoE alone; call "
        "moesaic.exchange.transformers_repairs.repair_forward(model) after loading it there"
    ),
)
T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    ConfigMapping(
        T5_MODEL,
        (
            *_T5_ENTRIES,
            Key("num_layers", "encoder.layers"),
            Key("num_decoder_layers", "decoder.layers", also="num_layers"),
            Key("d_ff", "feed_forward.hidden"),
            Key(
                "feed_forward_proj",
                "feed_forward.activation",
                default="relu",
                values=_ACTIVATIONS
                | {
                    "gated-gelu": GEGLU(form="tanh"),
                    "gated-silu": SwiGLU(),
                    "gated-relu": ReGLU(),
                },
            ),
        ),
        _T5_OTHER,
    ),
    {DENSE: _t5_tensors(feed_forward="DenseReluDense")},
    copies=_T5_COPIES,
    derived=_NEVER_READ,
    tag=NoTag(start="pad"),
)
SWITCH = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    ConfigMapping(
        T5_MODEL.replace(moe=MoE(experts=2, select=SwitchTop1(), limit=RowCapacity(), balance=())),
        (
            *_T5_ENTRIES,
            *(
                StackLayers(
                    side, count, f"num_sparse_{side}_layers", 3, second_of_step, also="num_layers"
                )
                for side, count in (("encoder", "num_layers"), ("decoder", "num_decoder_layers"))
            ),
            Key("d_ff", ("feed_forward.hidden", "moe.hidden")),
            Key("dense_act_fn", "feed_forward.activation", default="relu", values=_ACTIVATIONS),
            Key("num_experts", "moe.experts", default=8),
            Key("expert_capacity", "moe.limit.number", default=64),
            RouterLosses(SequenceBalance, z_loss=True),
            FixedKey("router_bias", value=False),
            FixedKey("router_dtype", "float32"),
        ),
        _T5_OTHER | {"feed_forward_proj"},
    ),
    {PER_EXPERT: _t5_tensors(feed_forward="mlp")},
    copies=_T5_COPIES,
    derived=_NEVER_READ,
    tag=NoTag(start="pad"),
)
