"""Language model recipes: decoder-only models of the demo's text, and of your own documents."""

from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.document_packing import Concatenated, DocumentPacking, Separated
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.head import LanguageModelHead
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SquaredReLU
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW, Muon, Spectral
from moesaic.recipes.demo_recipe import LANGUAGES
from moesaic.train.corpus_source import CorpusFolder, NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

DEMO_VOCABULARY = 2048
VOCABULARY = 4096


def language_model_demo() -> Run:
    """The demo's text as a language model of nine languages: three minutes on two CPU cores."""
    return Run(
        name="language-model-demo",
        data=TextData(
            corpus=NamedCorpus(name="catalogues-small"),
            languages=("eng", *LANGUAGES),
            tokenizer=TrainedTokenizer(vocab_size=DEMO_VOCABULARY),
            mixture=_language_modelling(Separated(), temperature=2.0),
            loader=LoaderConfig(batch_tokens=4096, max_target=64, collator=DecoderOnlyCollator()),
        ),
        model=_model(vocab_size=DEMO_VOCABULARY, dim=128, layers=3),
        optimizer=_muon(),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=700,
        checkpoint=CheckpointConfig(every=150, keep=2),
        validation=ValidationConfig(every=150, rows=32),
        log=LogConfig(every=10),
    )


def language_model() -> Run:
    """Your documents (a corpus called "documents") as a language model: an hour on two CPU cores.

    Documents are joined into rows of 256 tokens. ``moesaic data build documents --texts PATH``
    makes the corpus.
    """
    return Run(
        name="language-model",
        data=TextData(
            corpus=CorpusFolder(path="documents"),
            tokenizer=TrainedTokenizer(vocab_size=VOCABULARY),
            mixture=_language_modelling(Concatenated(), temperature=1.0),
            loader=LoaderConfig(
                batch_tokens=8192,
                bucket_window=4096,
                max_target=256,
                collator=DecoderOnlyCollator(),
            ),
        ),
        model=_model(vocab_size=VOCABULARY, dim=256, layers=4),
        optimizer=_muon(),
        schedule=WSD(warmup=0.02, decay=0.5, shape=LinearDecay()),
        steps=1500,
        checkpoint=CheckpointConfig(every=250, keep=2),
        validation=ValidationConfig(every=250, rows=64),
        log=LogConfig(every=10),
    )


def _language_modelling(packing: DocumentPacking, *, temperature: float) -> MixtureConfig:
    return MixtureConfig(
        tasks=(WeightedTask(task=CausalLM(packing=packing)),), temperature=temperature
    )


def _model(*, vocab_size: int, dim: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        encoder=Stack(layers=0),
        decoder=Stack(layers=layers, moe_every=2),
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=2 * dim, activation=SquaredReLU()),
        moe=MoE(experts=8, select=SwitchTop1(), balance=(SwitchBalance(weight=0.01),)),
        head=LanguageModelHead(label_smoothing=0.0),
    )


def _muon() -> Muon:
    return Muon(
        lr=0.04,
        weight_decay=0.05,
        ns_steps=4,
        scale=Spectral(),
        adamw=AdamW(lr=6e-3, weight_decay=0.05, decayed_kinds=("router",)),
    )
