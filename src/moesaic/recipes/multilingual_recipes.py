"""Multilingual recipes: fifty languages of software text, meant to beat a translation memory.

Neither has been run to its end, so whether they do is open: after 3.7M tokens the laptop recipe
scored below copying (``docs/log.md``; ``moesaic curve RUN`` makes such a curve). They read
``software-171``, which is built from ordinary distribution packages. Another corpus of these
languages serves as well:
``--set 'data.corpus=CorpusFolder(path="NAME")'``.
"""

from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import BothDirections, Denoising, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SquaredReLU, SwiGLU
from moesaic.nn.norm import LayerNorm, RMSNorm
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW, Muon, Spectral
from moesaic.parallel.precision import BFloat16
from moesaic.train.corpus_source import NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

# The 36 largest languages of the corpus, then 14 of other families and scripts.
FIFTY = (
    *("it", "fr", "de", "da", "es", "ru", "sv", "pl", "pt-BR", "uk", "zh-Hans", "nl", "ca"),
    *("cs", "pt", "ja", "tr", "zh-Hant", "fi", "sl", "hu", "ko", "el", "sk", "eu", "id", "gl"),
    *("nb", "vi", "sr", "ro", "bg", "et", "hr", "ar", "lt"),
    *("hi", "bn", "ta", "te", "ml", "gu", "mr", "kn", "pa", "ne", "th", "ka", "kk", "sw"),
)


def multilingual_50() -> Run:
    """Fifty languages both ways, 32 experts, bfloat16: for a large GPU; not run to its end yet."""
    vocabulary = 32_000
    return Run(
        name="multilingual-50",
        data=TextData(
            corpus=NamedCorpus(name="software-171"),
            languages=("en", *FIFTY),
            tokenizer=TrainedTokenizer(
                vocab_size=vocabulary, sample_lines=2_000_000, copy_units=16
            ),
            mixture=_mixture(both_ways=True),
            loader=LoaderConfig(batch_tokens=65_536, max_source=192, max_target=224),
        ),
        model=ModelConfig(
            vocab_size=vocabulary,
            dim=768,
            encoder=Stack(layers=12, moe_every=2),
            decoder=Stack(layers=6, moe_every=2),
            attention=AttentionConfig(heads=12),
            feed_forward=FeedForwardConfig(hidden=2048, activation=SwiGLU()),
            moe=MoE(experts=32, select=TopK(k=2), balance=(SwitchBalance(), RouterZLoss())),
            norm=RMSNorm(),
            dropout=0.1,
        ),
        optimizer=Muon(lr=2e-3, weight_decay=0.05, adamw=AdamW(lr=2e-3, weight_decay=0.01)),
        schedule=WSD(warmup=1 / 30, decay=0.3),
        steps=60_000,
        precision=BFloat16(),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        validation=ValidationConfig(every=1000, rows=200),
        log=LogConfig(every=20, routing_stats_every=50),
    )


def multilingual_50_laptop() -> Run:
    """Fifty languages from English, 16 experts: for a CPU with patience; not run to its end yet."""
    vocabulary = 8192
    return Run(
        name="multilingual-50-laptop",
        data=TextData(
            corpus=NamedCorpus(name="software-171"),
            languages=("en", *FIFTY),
            tokenizer=TrainedTokenizer(vocab_size=vocabulary, copy_units=16),
            mixture=_mixture(both_ways=False),
            loader=LoaderConfig(batch_tokens=4096, max_source=64, max_target=80),
        ),
        model=ModelConfig(
            vocab_size=vocabulary,
            dim=192,
            encoder=Stack(layers=4, moe_every=2),
            decoder=Stack(layers=2, moe_every=2),
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(hidden=384, activation=SquaredReLU()),
            moe=MoE(experts=16, select=SwitchTop1(), balance=(SwitchBalance(weight=0.02),)),
            norm=LayerNorm(),
        ),
        optimizer=Muon(
            lr=0.03,
            weight_decay=0.02,
            ns_steps=4,
            scale=Spectral(),
            adamw=AdamW(lr=6e-3, decayed_kinds=("router",)),
        ),
        schedule=WSD(warmup=0.01, decay=0.9, shape=LinearDecay()),
        steps=20_000,
        checkpoint=CheckpointConfig(every=500, keep=2),
        validation=ValidationConfig(every=500, rows=40),
        log=LogConfig(every=20, routing_stats_every=20),
    )


def _mixture(*, both_ways: bool) -> MixtureConfig:
    translation = Translation(directions=BothDirections()) if both_ways else Translation()
    return MixtureConfig(
        tasks=(
            WeightedTask(task=translation, weight=0.85),
            WeightedTask(task=Denoising(), weight=0.15),
        ),
        temperature=3.0,
    )
