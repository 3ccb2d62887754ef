"""The demo recipe: eight target languages, three scripts, five minutes on two CPU cores.

Designed for 25 TFLOP: a small vocabulary, short strings, one active expert of eight, Muon, no
dropout, a linear decay to zero. ``docs/log.md`` has the experiments behind it.
"""

from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Denoising, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SquaredReLU
from moesaic.nn.norm import LayerNorm
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW, Muon, Spectral
from moesaic.train.corpus_source import NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

LANGUAGES = ("spa", "por", "ita", "fra", "cat", "rus", "ukr", "ell")
VOCABULARY = 2048


def demo() -> Run:
    """Eight languages, three scripts, 2M parameters (1M active): five minutes on two CPU cores."""
    return Run(
        name="demo",
        data=TextData(
            corpus=NamedCorpus(name="catalogues-small"),
            languages=("eng", *LANGUAGES),
            tokenizer=TrainedTokenizer(vocab_size=VOCABULARY, copy_units=16),
            mixture=MixtureConfig(
                tasks=(
                    WeightedTask(task=Translation(), weight=0.9),
                    WeightedTask(task=Denoising(), weight=0.1),
                )
            ),
            loader=LoaderConfig(batch_tokens=4096, max_source=40, max_target=48),
        ),
        model=ModelConfig(
            vocab_size=VOCABULARY,
            dim=128,
            encoder=Stack(layers=3, moe_every=2),
            decoder=Stack(layers=2, moe_every=2),
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(hidden=256, activation=SquaredReLU()),
            moe=MoE(experts=8, select=SwitchTop1(), balance=(SwitchBalance(weight=0.01),)),
            norm=LayerNorm(),
        ),
        optimizer=Muon(
            lr=0.04,
            weight_decay=0.05,
            ns_steps=4,
            scale=Spectral(),
            adamw=AdamW(lr=6e-3, weight_decay=0.05, decayed_kinds=("router",)),
        ),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=900,
        checkpoint=CheckpointConfig(every=150, keep=2),
        validation=ValidationConfig(every=150, rows=32),
        log=LogConfig(every=10),
    )
