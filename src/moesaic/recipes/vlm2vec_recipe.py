"""VLM2Vec: a contrastive head on a decoder, for retrieval of translations in fifty languages.

After VLM2Vec (2410.05160): the last token's state is the embedding, InfoNCE over the batch, the
query begins with what is asked (here the tag of its language). Text takes the place of images: a
query is an English text, its target the translation.
"""

from moesaic.data.batch_stream import LoaderConfig
from moesaic.data.collators import PairCollator
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.pooled_heads import Contrastive
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW
from moesaic.recipes.multilingual_recipes import FIFTY
from moesaic.train.corpus_source import NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

VOCABULARY = 4096


def vlm2vec() -> Run:
    """Translations in fifty languages as pairs, 8 experts, a contrastive head."""
    return Run(
        name="vlm2vec",
        data=TextData(
            corpus=NamedCorpus(name="software-171"),
            languages=("en", *FIFTY),
            tokenizer=TrainedTokenizer(vocab_size=VOCABULARY, sample_lines=40_000),
            mixture=MixtureConfig(tasks=(WeightedTask(task=Translation()),), temperature=3.0),
            loader=LoaderConfig(
                batch_tokens=4096, max_source=40, max_target=48, collator=PairCollator()
            ),
        ),
        model=ModelConfig(
            vocab_size=VOCABULARY,
            dim=64,
            head=Contrastive(temperature=0.05),
            encoder=Stack(layers=0),
            decoder=Stack(layers=2, moe_every=2),
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(hidden=96, activation=SwiGLU()),
            moe=MoE(experts=8, select=TopK(k=2), balance=(SwitchBalance(weight=0.01),)),
        ),
        optimizer=AdamW(lr=3e-3, weight_decay=0.01),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=500,
        checkpoint=CheckpointConfig(every=100, keep=1),
        validation=ValidationConfig(every=100, rows=8),
        log=LogConfig(every=20),
    )


def vlm2vec_dense() -> Run:
    """The dense control of ``vlm2vec``: as wide where there are no experts as a token uses."""
    run = vlm2vec()
    dense = run.model.replace(moe=NoMoE(), feed_forward=run.model.feed_forward.replace(hidden=144))
    return run.replace(name="vlm2vec-dense", model=dense)
