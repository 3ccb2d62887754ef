"""Presets of published MoE models: Z-code M3, NLLB, DeepSpeed, DeepSeek, Mixtral, Kimi K2.

The comment above each family says which numbers are published, and where; the others are guesses.
"""

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets.preset import PRESETS, Preset, Published
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE, NoMoE, SparseLayer, fine_grained
from moesaic.moe.expert_capacity import BatchPriority, Capacity, RandomPriority
from moesaic.moe.expert_selection import SwitchTop1, Top2, TopK
from moesaic.moe.shared_experts import ResidualExpert, SharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import GELU, FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm
from moesaic.nn.positional_encoding import LearnedPositions, Sinusoidal

NO_ENCODER = Stack(layers=0)

# Z-code M3: the multitask multilingual encoder-decoder of the DeepSpeed MoE paper (2109.10465).
#
# Published (read in secondary texts, not in the paper's tables): 24 encoder and 12 decoder
# layers, experts in every second feed-forward, top-1 gate, capacity factor 1.0 in training and
# 2.0 in evaluation, Random Token Selection, a dense base of 0.7B parameters, "10B" for 64
# experts, up to 128.
#
# Not published, and guessed: width 1024, feed-forward 4096, 16 heads, ReLU, pre-norm with biases,
# sinusoidal positions, a tied vocabulary of 128,000 and the balance weight 0.01. The guess agrees
# with "10B" and counts less than 0.7B for the dense base (a vocabulary near 190,000 would close
# that gap), so it is consistent, not confirmed.

ZCODE_SOURCE = "Kim et al. 2021, arXiv:2109.10465"
ZCODE_GUESSED = (
    "vocab_size",
    "dim",
    "attention",
    "feed_forward",
    "norm",
    "position",
    "embedding",
    "bias",
    "moe.balance",
)


@PRESETS.register()
def zcode_m3() -> Preset:
    """The dense base of Z-code M3 (0.7B published)."""
    return _zcode_preset(NoMoE(), published=(Published("total", 0.7e9, "secondary", ZCODE_SOURCE),))


@PRESETS.register()
def zcode_m3_64() -> Preset:
    """Z-code M3 with 64 experts (published as the 10B model)."""
    return _zcode_preset(
        _zcode_moe(64), published=(Published("total", 10e9, "secondary", ZCODE_SOURCE),)
    )


@PRESETS.register()
def zcode_m3_128() -> Preset:
    """Z-code M3 with 128 experts, the largest in the paper (size not published)."""
    return _zcode_preset(_zcode_moe(128))


def _zcode_moe(experts: int) -> MoE:
    return MoE(
        experts=experts,
        select=SwitchTop1(),
        limit=Capacity(factor=1.0, eval_factor=2.0, priority=RandomPriority()),
        balance=(SwitchBalance(weight=0.01),),
    )


def _zcode_preset(moe: SparseLayer, *, published: tuple[Published, ...] = ()) -> Preset:
    config = ModelConfig(
        vocab_size=128_000,
        dim=1024,
        encoder=Stack(layers=24, moe_every=2),
        decoder=Stack(layers=12, moe_every=2),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=4096, activation=ReLU()),
        moe=moe,
        norm=LayerNorm(bias=True),
        position=Sinusoidal(offset=2),
        bias=True,
        dropout=0.1,
    )
    return Preset(config, ZCODE_SOURCE, published, ZCODE_GUESSED)


# NLLB-MoE: the shape of Meta's 200-language MoE (2207.04672).
#
# 54.5B parameters are in the abstract of the pruning paper (2212.09811); 128 experts in every
# fourth layer are in the released training scripts (``run_flores200_4.4``, fairseq's nllb
# branch); 24 + 24 layers, width 2048, feed-forward 8192 and 16 heads are those of the 3.3B dense
# sibling in public scripts; 256,206 is the vocabulary of the released model. With them the count
# agrees with 54.5B. Its first position is 2 (the two before it belong to padding), and full experts
# keep tokens by batch priority, in transformers' implementation of it. We do not load its
# weights: details that change no shape (capacity, dropout) are guesses.


@PRESETS.register()
def nllb_moe_54b() -> Preset:
    """NLLB-MoE-54B shaped: 24 + 24 layers, 128 experts in every fourth, two per token."""
    config = ModelConfig(
        vocab_size=256_206,
        dim=2048,
        encoder=Stack(layers=24, moe_every=4),
        decoder=Stack(layers=24, moe_every=4),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=8192, activation=ReLU()),
        moe=MoE(
            experts=128,
            select=Top2(),
            limit=Capacity(factor=1.0, priority=BatchPriority()),
        ),
        norm=LayerNorm(bias=True),
        position=Sinusoidal(offset=2),
        bias=True,
        dropout=0.1,
    )
    published = (Published("total", 54.5e9, "paper", "Koishekenov et al. 2022, arXiv:2212.09811"),)
    guessed = ("moe.limit", "moe.balance", "dropout", "init")
    return Preset(config, "NLLB team 2022, arXiv:2207.04672", published, guessed)


# DeepSpeed-MoE: decoders of 24 layers with experts in every second one (2201.05596).
#
# From the paper and its scripts: width 1024, 16 heads, one expert per token; 128 experts in each
# of 12 layers ("350M+MoE-128", 13B), or a pyramid of ten layers of 32 and two of 64 with a dense
# feed-forward in parallel ("PR-MoE", 4B). The vocabulary, learned positions, GELU and biases are
# the usual ones of such decoders and our guesses; with them the counts agree.

DEEPSPEED_SOURCE = "Rajbhandari et al. 2022, arXiv:2201.05596"
DEEPSPEED_GUESSED = (
    "vocab_size",
    "feed_forward",
    "norm",
    "position",
    "embedding",
    "bias",
    "moe.balance",
)
DEEPSPEED_MOE = MoE(
    experts=128,
    select=SwitchTop1(),
    limit=Capacity(factor=1.0, eval_factor=1.0, priority=RandomPriority()),
)


@PRESETS.register()
def deepspeed_moe_128() -> Preset:
    """350M+MoE-128: the same number of experts in every second layer (published as 13B)."""
    return _deepspeed_preset(DEEPSPEED_MOE, published=13e9)


@PRESETS.register()
def pr_moe_350m() -> Preset:
    """350M+PR-MoE-32/64: a pyramid of residual MoE layers (published as 4B)."""
    residual = DEEPSPEED_MOE.replace(experts=32, shared_experts=ResidualExpert())
    return _deepspeed_preset(residual, pyramid=(32,) * 10 + (64,) * 2, published=4e9)


def _deepspeed_preset(moe: MoE, *, published: float, pyramid: tuple[int, ...] = ()) -> Preset:
    config = ModelConfig(
        vocab_size=50_304,
        dim=1024,
        encoder=NO_ENCODER,
        decoder=Stack(layers=24, moe_every=2, experts_per_layer=pyramid),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=4096, activation=GELU()),
        moe=moe,
        norm=LayerNorm(bias=True),
        position=LearnedPositions(max_length=2048),
        embedding=EmbeddingConfig(scaled=False),
        bias=True,
    )
    return Preset(
        config,
        DEEPSPEED_SOURCE,
        (Published("total", published, "paper", DEEPSPEED_SOURCE),),
        DEEPSPEED_GUESSED,
    )


# DeepSeekMoE: fine-grained and shared experts, decoder-only (2401.06066).
#
# 16B: every number is in the released config (28 layers, the first dense and 10944 wide, width
# 2048, 16 heads, 64 routed experts 1408 wide of which 6 are chosen, 2 shared, softmax weights
# that are not renormalised, vocabulary 102,400, untied); 16.4B parameters with 2.8B active are
# quoted in secondary texts. 2B, the paper's validation model: 9 layers, width 1280, 10 heads,
# sixteen experts split in four of which one is shared and seven are chosen; its feed-forward and
# vocabulary are guesses with which the count agrees with "2B".

DEEPSEEK_SOURCE = "Dai et al. 2024, arXiv:2401.06066"


@PRESETS.register()
def deepseek_moe_16b() -> Preset:
    """DeepSeekMoE-16B shaped: 27 of 28 layers with 2 shared and 64 routed experts, 6 per token."""
    config = ModelConfig(
        vocab_size=102_400,
        dim=2048,
        encoder=NO_ENCODER,
        decoder=Stack(layers=28, moe_every=1, first_dense_layers=1),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=10_944),
        moe=MoE(
            experts=64,
            hidden=1408,
            select=TopK(k=6, normalise="none"),
            balance=(SwitchBalance(weight=0.001),),
            shared_experts=SharedExperts(number=2),
        ),
        embedding=EmbeddingConfig(tied=False, scaled=False),
    )
    published = (
        Published("total", 16.4e9, "secondary", DEEPSEEK_SOURCE),
        Published("active", 2.8e9, "secondary", DEEPSEEK_SOURCE),
    )
    return Preset(config, DEEPSEEK_SOURCE, published, ("init",))


@PRESETS.register()
def deepseek_moe_2b() -> Preset:
    """The validation model: 16 experts, two of them active, each split in four; one is shared."""
    hidden = 3412
    coarse = MoE(experts=16, select=TopK(k=2), balance=(SwitchBalance(weight=0.01),))
    config = ModelConfig(
        vocab_size=8_000,
        dim=1280,
        encoder=NO_ENCODER,
        decoder=Stack(layers=9, moe_every=1),
        attention=AttentionConfig(heads=10),
        feed_forward=FeedForwardConfig(hidden=hidden),
        moe=fine_grained(coarse, hidden=hidden, splits=4, shared=1),
        embedding=EmbeddingConfig(tied=False, scaled=False),
    )
    guessed = ("vocab_size", "feed_forward", "embedding", "init")
    return Preset(
        config, DEEPSEEK_SOURCE, (Published("total", 2e9, "paper", DEEPSEEK_SOURCE),), guessed
    )


# Mixtral 8x22B: the released config (56 layers, width 6144, 48 heads, 8 of keys and values, 8
# experts 16,384 wide of which 2 are chosen, vocabulary 32,768, untied). Its parameters are quoted
# in secondary texts.

MIXTRAL_SOURCE = "the released config of Mixtral-8x22B-v0.3 (mistralai), as quoted elsewhere"


@PRESETS.register()
def mixtral_8x22b() -> Preset:
    """56 layers of 8 experts, 2 per token: the model of MoE Parallel Folding (2504.14960)."""
    config = ModelConfig(
        vocab_size=32_768,
        dim=6144,
        encoder=NO_ENCODER,
        decoder=Stack(layers=56, moe_every=1),
        attention=AttentionConfig(heads=48, kv_heads=8),
        feed_forward=FeedForwardConfig(hidden=16_384),
        moe=MoE(experts=8, select=TopK(k=2), balance=(SwitchBalance(weight=0.001),)),
        embedding=EmbeddingConfig(tied=False, scaled=False),
    )
    published = (
        Published("total", 141e9, "secondary", MIXTRAL_SOURCE),
        Published("active", 39e9, "secondary", MIXTRAL_SOURCE),
    )
    return Preset(config, MIXTRAL_SOURCE, published, ("moe.balance", "init"))


# Models that need hundreds or thousands of ranks.
#
# ``zcode-200b``: a Z-code M3 of the 200B class. Only what is said above of the family is
# published (24 encoder and 12 decoder layers, experts in every second feed-forward, top-1 gate,
# capacity factors, up to 128 experts; 2109.10465); the widths are our choice, so that 128 experts
# have 200B parameters.
#
# ``trillion-384``: a decoder of a trillion parameters with the numbers of the released config of
# Kimi K2 as secondary texts quote them (61 layers, the first dense and 18432 wide, width 7168, 64
# heads, 384 experts 2048 wide of which 8 are chosen, 1 shared, vocabulary 163,840). It differs in
# multi-head instead of latent attention, softmax instead of sigmoid scores, and the balance loss.

KIMI_K2 = "the released config of Kimi K2 (moonshotai.github.io/Kimi-K2), as quoted elsewhere"


@PRESETS.register()
def zcode_200b() -> Preset:
    """Z-code M3 with 128 experts, widened to 200B parameters."""
    base = zcode_m3_128()
    config = base.config.replace(
        dim=3072,
        attention=AttentionConfig(heads=24),
        feed_forward=base.config.feed_forward.replace(hidden=14_336),
    )
    return Preset(config, ZCODE_SOURCE, guessed=ZCODE_GUESSED)


@PRESETS.register()
def trillion_384() -> Preset:
    """61 layers of 384 experts, 8 per token and one shared."""
    config = ModelConfig(
        vocab_size=163_840,
        dim=7168,
        encoder=NO_ENCODER,
        decoder=Stack(layers=61, moe_every=1, first_dense_layers=1),
        attention=AttentionConfig(heads=64),
        feed_forward=FeedForwardConfig(hidden=18_432),
        moe=MoE(
            experts=384,
            hidden=2048,
            select=TopK(k=8),
            balance=(SwitchBalance(weight=0.001),),
            shared_experts=SharedExperts(number=1),
        ),
        embedding=EmbeddingConfig(tied=False, scaled=False),
    )
    published = (Published("total", 1e12, "secondary", KIMI_K2),)
    return Preset(config, KIMI_K2, published, ("attention", "moe.select", "moe.balance", "init"))
