"""Tiny recipes: invented languages and a small model, trained in seconds; for tests."""

from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM, Denoising, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm
from moesaic.optim.lr_schedule import WSD
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.train.corpus_source import NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

VOCABULARY = 512


def tiny() -> Run:
    """Three invented languages, no network: translates after half a minute of training."""
    return Run(
        name="tiny",
        data=TextData(
            corpus=NamedCorpus(name="synthetic"),
            tokenizer=TrainedTokenizer(vocab_size=VOCABULARY),
            mixture=MixtureConfig(
                tasks=(
                    WeightedTask(task=Translation(), weight=0.9),
                    WeightedTask(task=Denoising(), weight=0.1),
                )
            ),
            loader=LoaderConfig(batch_tokens=2048, max_source=48, max_target=48),
        ),
        model=_model(encoder=2),
        optimizer=Muon(lr=0.03, adamw=AdamW(lr=5e-3)),
        schedule=WSD(warmup=0.05, decay=0.4),
        steps=200,
        checkpoint=CheckpointConfig(every=50, keep=2),
        validation=ValidationConfig(every=50, rows=64),
        log=LogConfig(every=5),
    )


def tiny_lm() -> Run:
    """The same text as a decoder-only language model with top-2 experts."""
    tasks = (WeightedTask(task=CausalLM()),)
    base = tiny()
    data = base.data.replace(
        mixture=MixtureConfig(tasks=tasks),
        loader=LoaderConfig(
            batch_tokens=2048, max_source=48, max_target=48, collator=DecoderOnlyCollator()
        ),
    )
    return base.replace(name="tiny-lm", data=data, model=_model(encoder=0))


def _model(*, encoder: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=64,
        encoder=Stack(layers=encoder, moe_every=2),
        decoder=Stack(layers=2, moe_every=2),
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForwardConfig(hidden=128, activation=ReLU()),
        moe=MoE(experts=4, select=TopK(k=2)),
        norm=LayerNorm(),
    )
