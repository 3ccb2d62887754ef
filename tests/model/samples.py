"""Models and batches for the tests of the model: every part appears in some variant."""

from dataclasses import replace

import torch

from mixer_cases import MIXERS, alone, hybrid
from moesaic.data.batch import (
    IGNORE_LABEL,
    SOURCE_LANGUAGE,
    TARGET_LANGUAGE,
    TASK,
    Batch,
    InputRows,
)
from moesaic.data.vocabulary import Vocabulary
from moesaic.model.block_layout import ParallelResidual, SequentialResidual
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.generate import DecodingRules
from moesaic.model.transformer import Transformer
from moesaic.moe.adaptive_auxiliary_losses import NullBalance
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.moe.auxiliary_losses import (
    FirstChoiceBalance,
    MutualInformationBalance,
    RouterZLoss,
    SwitchBalance,
    TargetLoadBalance,
)
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.cross_layer_router import DecoupledRouting, PreGatedRouting, RecurrentRouting
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.expert_capacity import RowCapacity
from moesaic.moe.expert_selection import (
    Hash,
    NullTopK,
    SigmoidTopK,
    SwitchTop1,
    Top2,
    TopGroups,
    TopK,
)
from moesaic.moe.expert_selection_dynamic import DenseAll, ExpertChoice, Threshold, TopP
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.null_experts import IdentityExperts, ZeroExperts
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.moe.router_gate import (
    HiddenStateAndTag,
    HiddenStateAndToken,
    IndependentRouters,
    TagOnly,
    TokenOnly,
)
from moesaic.moe.router_noise import StochasticWarmup
from moesaic.moe.shared_experts import GatedSharedExperts, ResidualExpert, SharedExperts
from moesaic.moe.soft_moe import SoftMoE
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import (
    GEGLU,
    ClampedSwiGLU,
    FeedForwardConfig,
    ReGLU,
    ReLU,
    SquaredReLU,
    SwiGLU,
)
from moesaic.nn.norm import LayerNorm
from moesaic.nn.positional_encoding import (
    LearnedPositions,
    NoPositionalEncoding,
    RelativeBias,
    Rotary,
    Sinusoidal,
)
from moesaic.nn.qk_norm import AcrossHeadsQKNorm
from moesaic.nn.rotary_scaling import DynamicNTKScaling, LongRoPE

VOCABULARY = 40
BASE = ModelConfig(
    vocab_size=VOCABULARY,
    dim=16,
    encoder=Stack(layers=2),
    decoder=Stack(layers=2, moe_every=1),
    attention=AttentionConfig(heads=4, kv_heads=2),
    feed_forward=FeedForwardConfig(hidden=24, activation=SwiGLU()),
    moe=MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(), RouterZLoss())),
)
NONE = Stack(layers=0)
LINKED = {
    "recurrent": RecurrentRouting(width=6),
    "pre-gated": PreGatedRouting(),
    "decoupled": DecoupledRouting(dim=8, heads=2),
}
CONDITIONED = {
    "on-tag": HiddenStateAndTag(),
    "only-tag": TagOnly(),
    "on-token": HiddenStateAndToken(),
    "only-token": TokenOnly(),
}


def _with(**fields: object) -> ModelConfig:
    return BASE.replace(moe=MoE(experts=4, select=TopK(k=2), **fields))


VARIANTS = {
    "rotary-top2": BASE,
    "dense": BASE.replace(moe=NoMoE()),
    "switch-layernorm-sinusoidal-bias": BASE.replace(
        moe=MoE(experts=3, select=SwitchTop1(), hidden=8),
        norm=LayerNorm(bias=True),
        position=Sinusoidal(),
        bias=True,
        feed_forward=FeedForwardConfig(hidden=24, activation=ReLU()),
    ),
    "gshard-learned-untied": BASE.replace(
        moe=MoE(experts=4, select=Top2()),
        position=LearnedPositions(max_length=32),
        embedding=EmbeddingConfig(tied=False, scaled=False),
        attention=AttentionConfig(heads=2, head_dim=6),
    ),
    "decoder-only": BASE.replace(encoder=NONE),
    "decoder-only-dense-nope": BASE.replace(
        encoder=NONE,
        moe=NoMoE(),
        position=NoPositionalEncoding(),
        feed_forward=FeedForwardConfig(hidden=24, activation=SquaredReLU()),
    ),
    **{name: _with(cross_layer=link) for name, link in LINKED.items()},
    **{name: _with(router_input=condition) for name, condition in CONDITIONED.items()},
    "recurrent-on-tag": _with(
        cross_layer=RecurrentRouting(width=6), router_input=HiddenStateAndTag()
    ),
    "decoupled-decoder-only": _with(cross_layer=LINKED["decoupled"]).replace(encoder=NONE),
}
SPARSELY = {  # every rule of choosing in a whole model; encoders alone where it is not causal
    "sigmoid-in-groups": MoE(
        experts=4,
        select=SigmoidTopK(k=2, expert_groups=TopGroups(num_groups=2, top_groups=1)),
        balance=(),
    ),
    "top-p": MoE(experts=4, select=TopP(p=0.45)),
    "null-experts": MoE(
        experts=3,
        select=NullTopK(k=2),
        null_experts=ZeroExperts(number=2),
        balance=(NullBalance(),),
    ),
    "hash": MoE(experts=4, select=Hash(), balance=()),
    "dense-all": MoE(experts=3, select=DenseAll(), balance=(MutualInformationBalance(),)),
    "mixture-of-depths": MoE(
        experts=1, select=Threshold(), balance=(TargetLoadBalance(),), noise=StochasticWarmup()
    ),
}
VARIANTS |= {name: BASE.replace(moe=moe) for name, moe in SPARSELY.items()}
VARIANTS["expert-choice"] = BASE.replace(
    encoder=BASE.encoder.replace(moe=MoE(experts=3, select=ExpertChoice(), balance=()))
)


VARIANTS["soft"] = BASE.replace(
    encoder=BASE.encoder.replace(moe=SoftMoE(experts=3, slots=2, assumed_length=12))
)
MIXTURE = MoE(experts=4, select=TopK(k=2))
LAYER_PARTS = {  # what an expert is, and what stands around it
    "shared": MIXTURE.replace(shared_experts=SharedExperts(number=2), hidden=12),
    "gated-shared": MIXTURE.replace(shared_experts=GatedSharedExperts()),
    "narrow": MIXTURE.replace(dispatch_projection=DownProjection(ratio=0.5)),
    "lora": MIXTURE.replace(expert=LoRAExpert(rank=2)),
    "null": MIXTURE.replace(null_experts=ZeroExperts(number=2)),
    "identity": MIXTURE.replace(null_experts=IdentityExperts(number=2), weights_on="inputs"),
    "memory": ProductKeyMemory(keys_per_side=8, slots=6),
}
VARIANTS |= {name: BASE.replace(moe=moe) for name, moe in LAYER_PARTS.items()}
VARIANTS |= {
    "attention-experts-own-keys": BASE.replace(mixers={"attention": MixtureOfAttention(experts=3)}),
    "attention-experts-shared-keys-parallel": BASE.replace(
        mixers={"attention": MixtureOfAttention(experts=3, key_values="shared")},
        block_layout=ParallelResidual(),
        bias=True,
    ),
    "parallel-decoder-only": BASE.replace(
        encoder=NONE,
        mixers={"attention": MixtureOfAttention(experts=2)},
        block_layout=ParallelResidual(),
        norm=LayerNorm(),
    ),
}
VARIANTS["residual-pyramid-bias"] = BASE.replace(
    decoder=Stack(layers=3, sparse_layers=(0, 2), experts_per_layer=(2, 5)),
    moe=MIXTURE.replace(
        select=SwitchTop1(),
        weights_on="inputs",
        shared_experts=ResidualExpert(),
        cross_layer=IndependentRouters(bias=True),
    ),
    feed_forward=FeedForwardConfig(hidden=24, activation=ClampedSwiGLU(limit=0.5)),
    embedding=EmbeddingConfig(multiplier=2.0, logits_scaling=3.0),
    block_layout=SequentialResidual(residual_multiplier=0.5),
    bias=True,
)
SCALINGS = {
    "dynamic": DynamicNTKScaling(factor=3, original_length=32),  # longer rows keep cached keys
    "long": LongRoPE(
        factor=2, original_length=32, short_factors=(1.0, 1.5), long_factors=(1.3, 2.0)
    ),
}
VARIANTS["scaled-angles-limited-rows"] = BASE.replace(
    mixers={name: Attention(position=Rotary(scaling=each)) for name, each in SCALINGS.items()},
    decoder=BASE.decoder.replace(pattern="dynamic > long"),
    feed_forward=FeedForwardConfig(hidden=24, activation=ReGLU()),
    moe=MoE(
        experts=4,
        select=Top2(second="random", normalise="after", scale=0.8),
        limit=RowCapacity(number=64),  # in steps each token is a row
        balance=(FirstChoiceBalance(),),
    ),
)
VARIANTS |= {f"mixer-{name}": alone(BASE, name) for name in MIXERS}
VARIANTS["mixers-of-all-kinds"] = hybrid(BASE)
VARIANTS["mixers-parallel-residual"] = hybrid(BASE).replace(
    encoder=NONE, block_layout=ParallelResidual(), bias=True
)

VARIANTS["relative-bias"] = BASE.replace(
    moe=MIXTURE.replace(select=TopK(k=2, scale=2.5)),
    feed_forward=FeedForwardConfig(hidden=24, activation=GEGLU(form="tanh")),
    attention=AttentionConfig(heads=4, qk_norm=AcrossHeadsQKNorm(), clip=0.7, scale=1.0),
    position=RelativeBias(buckets=8, max_distance=6),
)


PADDING = 10**9  # no id of any vocabulary: padding is never read
# roles in no order, and an ordinary token with id 0
ROLES = Vocabulary(VOCABULARY, eos=2, pad=4, bos=3, unk=1, mask=5)
RULES = DecodingRules(ROLES)


def ids(rows: int, lengths: list[int], *, width: int) -> InputRows:
    """Random tokens, right-padded."""
    tokens = torch.randint(VOCABULARY, (rows, width))
    found = InputRows(tokens, torch.tensor(lengths))
    return InputRows(tokens.where(found.real, PADDING), found.lengths)


def question(model: Transformer, source: InputRows, *, tag: torch.Tensor) -> dict[str, InputRows]:
    """What a model is asked: its source and prompt, as ``generate`` takes them.

    Every second prompt is of two tokens, as NLLB's: ``eos`` and the tag.
    """
    if model.config.encoder.layers:
        tags = [[each] if each % 2 else [ROLES.eos, each] for each in tag.tolist()]
        return {"source": source, "prompt": InputRows.from_lists(tags)}
    rows = zip(source.values.tolist(), source.lengths.tolist(), tag.tolist(), strict=True)
    prompt = InputRows.from_lists([[*ids[:length], last] for ids, length, last in rows])
    return {"source": InputRows.empty(source.rows), "prompt": prompt}


def batch_of(source: InputRows, target: InputRows, labels: torch.Tensor) -> Batch:
    """A batch of one task and language."""
    zero = torch.zeros(target.rows, dtype=torch.long)
    groups = dict.fromkeys((TASK, SOURCE_LANGUAGE, TARGET_LANGUAGE), zero)
    return Batch(source, target, labels, groups, zero)


def full_batch(source: torch.Tensor, target: torch.Tensor) -> Batch:
    """A batch without padding in which every target token is a label."""
    return batch_of(InputRows.full(source), InputRows.full(target), target)


def batch_for(config: ModelConfig, *, padding: int = 0) -> Batch:
    """Four rows of different lengths; ``padding`` adds empty columns on both sides."""
    lengths = [5, 1, 3, 6]
    target = ids(4, lengths, width=6)
    labels = torch.randint(VOCABULARY, target.values.shape).where(target.real, IGNORE_LABEL)
    source = ids(4, [2, 7, 4, 4], width=7)
    if not config.encoder.layers:
        source = InputRows.empty(4)
        labels[:, 0] = IGNORE_LABEL  # a prompt is not predicted
    batch = batch_of(source, target, labels)
    return padded(batch, padding) if padding else batch


def padded(batch: Batch, columns: int) -> Batch:
    """The same rows with more padding on the right."""
    return replace(
        batch,
        source=_wider(batch.source, columns),
        target=_wider(batch.target, columns),
        labels=torch.nn.functional.pad(batch.labels, (0, columns), value=IGNORE_LABEL),
    )


def _wider(rows: InputRows, columns: int) -> InputRows:
    return InputRows(
        torch.nn.functional.pad(rows.values, (0, columns), value=PADDING), rows.lengths
    )
