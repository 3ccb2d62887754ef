"""JiuZhang's task prompts: one model for several tasks, whose routers read the prompt.

After JiuZhang 2.0 (2306.11027): an encoder with experts is shared by all tasks, and the prompt of
the task enters the gate. Here the prompt is the tag of the task, the first token of the source. The
controls: the same model whose routers read the hidden state alone, and one model for each task.
"""

from moesaic.data.batch_stream import LoaderConfig
from moesaic.data.collators import EncoderDecoderCollator
from moesaic.data.language_tag import TASK_PREFIX, TaskPrompt
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM, Denoising, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_gate import HiddenState, HiddenStateAndTag
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW
from moesaic.train.corpus_source import NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

VOCABULARY = 1024
TASKS = (Translation(), Denoising(), CausalLM())


def jiuzhang() -> Run:
    """Translation, denoising and language modelling in one model, the task in the gate."""
    moe = MoE(
        experts=8,
        select=TopK(k=2),
        balance=(SwitchBalance(weight=0.01),),
        router_input=HiddenStateAndTag(),
    )
    return Run(
        name="jiuzhang",
        data=TextData(
            corpus=NamedCorpus(name="catalogues-small"),
            languages=("eng", "spa", "fra", "rus"),
            tokenizer=TrainedTokenizer(
                vocab_size=VOCABULARY, added_tags=tuple(TASK_PREFIX + task.name for task in TASKS)
            ),
            mixture=MixtureConfig(tasks=tuple(WeightedTask(task=task) for task in TASKS)),
            loader=LoaderConfig(
                batch_tokens=3072,
                max_source=40,
                max_target=48,
                collator=EncoderDecoderCollator(tag=TaskPrompt()),
            ),
        ),
        model=ModelConfig(
            vocab_size=VOCABULARY,
            dim=64,
            encoder=Stack(layers=2, moe_every=1),
            decoder=Stack(layers=2, moe_every=0),
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(hidden=128, activation=SwiGLU()),
            moe=moe,
        ),
        optimizer=AdamW(lr=3e-3, weight_decay=0.01),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=600,
        checkpoint=CheckpointConfig(every=150, keep=1),
        validation=ValidationConfig(every=150, rows=100),
        log=LogConfig(every=20),
    )


def jiuzhang_plain_gate() -> Run:
    """The control of ``jiuzhang`` whose routers read the hidden state alone."""
    run = jiuzhang()
    return run.replace(
        name="jiuzhang-plain-gate",
        model=run.model.replace(moe=run.model.moe.replace(router_input=HiddenState())),
    )
