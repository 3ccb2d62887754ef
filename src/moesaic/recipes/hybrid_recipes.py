"""Hybrid recipes: small language models whose blocks mix attention with recurrences.

Each follows the layer pattern of a published system at the size of a test; widths, experts and data
are ours. ``benchmarks/hybrids.py`` trains them beside models of attention alone.
"""

from collections.abc import Mapping

from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.document_packing import Concatenated
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_parts import SlidingWindow
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.gated_linear_attention import GatedLinearAttention
from moesaic.nn.mamba2 import Mamba2
from moesaic.nn.sequence_mixer import SequenceMixer
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW, Muon, Spectral
from moesaic.train.corpus_source import NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

LANGUAGES = ("eng", "spa", "fra")
VOCABULARY = 1024
WINDOW = 32


def hunyuan_hybrid() -> Run:
    """Blocks of Hunyuan-TurboS: attention, Mamba-2, MoE and Mamba-2, MoE, in turns."""
    moe = MoE(
        experts=8,
        select=TopK(k=2),
        limit=Capacity(factor=1.5),
        balance=(SwitchBalance(weight=0.01),),
        shared_experts=SharedExperts(number=1),
        hidden=64,
    )
    stack = Stack(layers=4, moe_every=1, pattern="attention > mamba, mamba")
    mamba = Mamba2(head_dim=16, expand=1.0, state=16, groups=2)
    return _run("hunyuan-hybrid", _model(moe=moe, stack=stack, mixers={"mamba": mamba}))


def spikingbrain_inter() -> Run:
    """Layers of SpikingBrain-7B: gated linear attention and windowed attention in turns, dense."""
    stack = Stack(layers=4, pattern="linear, window")
    return _run("spikingbrain-inter", _model(moe=NoMoE(), stack=stack, mixers=_spiking_mixers()))


def spikingbrain_intra() -> Run:
    """Layers of SpikingBrain-76B: linear attention beside windowed, full attention at the end.

    A shared expert and one of eight; the first block is dense.
    """
    both = "linear | window"
    pattern = f"{both}, {both}, {both}, attention"
    stack = Stack(layers=4, moe_every=1, first_dense_layers=1, pattern=pattern)
    moe = MoE(
        experts=8,
        select=SwitchTop1(),
        balance=(SwitchBalance(weight=0.01),),
        shared_experts=SharedExperts(number=1),
        hidden=64,
    )
    return _run("spikingbrain-intra", _model(moe=moe, stack=stack, mixers=_spiking_mixers()))


def _spiking_mixers() -> dict[str, SequenceMixer]:
    return {
        "linear": GatedLinearAttention(heads=4),
        "window": Attention(window=SlidingWindow(size=WINDOW)),
    }


def _model(*, moe: SparseLayer, stack: Stack, mixers: Mapping[str, SequenceMixer]) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=64,
        encoder=Stack(layers=0),
        decoder=stack,
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=128),
        moe=moe,
        mixers=dict(mixers),
    )


def _run(name: str, model: ModelConfig) -> Run:
    """Return the run of such a model on text of the demo's corpus, in rows of joined texts."""
    return Run(
        name=name,
        data=TextData(
            corpus=NamedCorpus(name="catalogues-small"),
            languages=LANGUAGES,
            tokenizer=TrainedTokenizer(vocab_size=VOCABULARY),
            mixture=MixtureConfig(tasks=(WeightedTask(task=CausalLM(packing=Concatenated())),)),
            loader=LoaderConfig(
                batch_tokens=1024, max_source=128, max_target=128, collator=DecoderOnlyCollator()
            ),
        ),
        model=model,
        optimizer=Muon(lr=0.03, scale=Spectral(), adamw=AdamW(lr=6e-3)),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=300,
        checkpoint=CheckpointConfig(every=100, keep=1),
        validation=ValidationConfig(every=100, rows=64),
        log=LogConfig(every=25),
    )
