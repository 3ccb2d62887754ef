"""DMoERM: a reward model with two layers of experts, and a single reward model as its control.

After DMoERM (2403.01197): an outer layer chooses the task's experts, an inner layer uses all of
them, each a LoRA over a shared base. Here both are one group-limited router: a group of LoRA
experts for each task, the best group by the task's tag, all experts of that group. The paper trains
in three phases, with capability labels and an MLP over the experts' states; here all is trained at
once, on preferences alone, and the router's softmax weighs the experts.
"""

from moesaic.data.batch_stream import LoaderConfig
from moesaic.data.collators import PairCollator
from moesaic.data.language_tag import TASK_PREFIX, TaskPrompt
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.preferences import Preferences
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.pooled_heads import Reward
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import TopGroups, TopK
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.router_gate import TagOnly
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW
from moesaic.train.corpus_source import NamedCorpus
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.text_data import TextData

TASKS, CAPABILITIES, RANK = 4, 4, 4
DIM, HIDDEN, VOCABULARY = 48, 96, 512
# the LoRA experts that a token uses, as width of one feed-forward (three matrices with DIM)
LORA_WIDTH = CAPABILITIES * RANK * (2 * DIM + 3 * HIDDEN) // (3 * DIM)


def dmoerm() -> Run:
    """Four tasks of synthetic preferences over real texts, 30 % of the labels reversed."""
    tasks = tuple(Preferences(number=number, languages=("eng_Latn",)) for number in range(TASKS))
    return Run(
        name="dmoerm",
        data=TextData(
            corpus=NamedCorpus(name="catalogues-small"),
            languages=("eng",),
            tokenizer=TrainedTokenizer(
                vocab_size=VOCABULARY, added_tags=tuple(TASK_PREFIX + task.name for task in tasks)
            ),
            mixture=MixtureConfig(tasks=tuple(WeightedTask(task=task) for task in tasks)),
            loader=LoaderConfig(
                batch_tokens=3072,
                max_source=48,
                max_target=48,
                collator=PairCollator(tag=TaskPrompt()),
            ),
        ),
        model=ModelConfig(
            vocab_size=VOCABULARY,
            dim=DIM,
            head=Reward(),
            encoder=Stack(layers=0),
            decoder=Stack(layers=2, moe_every=1),
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(hidden=HIDDEN, activation=SwiGLU()),
            moe=MoE(
                experts=TASKS * CAPABILITIES,
                expert=LoRAExpert(rank=RANK, alpha=2 * RANK),
                select=TopK(
                    k=CAPABILITIES,
                    expert_groups=TopGroups(
                        num_groups=TASKS, top_groups=1, experts_per_score=CAPABILITIES
                    ),
                ),
                balance=(SwitchBalance(weight=0.1),),
                router_input=TagOnly(),
            ),
        ),
        optimizer=AdamW(lr=6e-3, weight_decay=0.01),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=400,
        checkpoint=CheckpointConfig(every=100, keep=1),
        validation=ValidationConfig(every=100, rows=200),
        log=LogConfig(every=20),
    )


def dmoerm_single() -> Run:
    """The control of ``dmoerm``: one reward model with as many parameters as a token uses there."""
    run = dmoerm()
    dense = run.model.replace(
        moe=NoMoE(), feed_forward=run.model.feed_forward.replace(hidden=HIDDEN + LORA_WIDTH)
    )
    return run.replace(name="dmoerm-single", model=dense)
