"""Tiny models, batches and runs for tests: a training step takes milliseconds."""

from dataclasses import replace

from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.sources.synthetic import SyntheticLanguages
from moesaic.data.batch import IGNORE_LABEL, SOURCE_LANGUAGE, TARGET_LANGUAGE, TASK, Batch
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Denoising, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.distributed.world import SingleProcess, World
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE, SparseLayer
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.lr_schedule import WSD
from moesaic.train.corpus_source import BuiltCorpus, CorpusFolder
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig
from moesaic.train.run_training import seeded_trainer
from moesaic.train.text_data import TextData, require_text
from moesaic.train.trainer import Trainer
from moesaic.verify.synthetic_batches import (
    VOCABULARY,
    SyntheticBatches,
    SyntheticShape,
    uneven_batch,
)

TASKS = ("translation", "denoising")
LANGUAGES = ("deu_Latn", "ell_Grek", "fra_Latn")
LABELS = {TASK: TASKS, SOURCE_LANGUAGE: LANGUAGES, TARGET_LANGUAGE: LANGUAGES}
SMALL_SYNTHETIC_CORPUS = CorpusRecipe(name="few-phrases", source=SyntheticLanguages(phrases=500))
BALANCED_TOP1 = MoE(experts=4, select=SwitchTop1(), balance=(SwitchBalance(), RouterZLoss()))


def tiny_model_config(*, moe: SparseLayer = BALANCED_TOP1, layers: int = 1) -> ModelConfig:
    """Return an encoder-decoder of ``layers`` layers each, experts in every one.

    A rule that is not causal is used in the encoder only; the decoder has the usual one.
    """
    stack = Stack(layers=layers, moe_every=1)
    causal = moe if moe.causal else BALANCED_TOP1
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=16,
        encoder=stack if moe.causal else stack.replace(moe=moe),
        decoder=stack,
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForwardConfig(hidden=32),
        moe=causal,
    )


def random_batch(rows: int, *, seed: int, length: int = 9) -> Batch:
    """Return rows of random lengths (at least 2), tasks and languages."""
    batch = uneven_batch(SyntheticShape(length=length), rows=rows, seed=seed)
    real = batch.target.real
    labels = batch.target.values.roll(-1, dims=1)
    return replace(batch, labels=labels.where(real & real.roll(-1, dims=1), IGNORE_LABEL))


class TinyStream(SyntheticBatches):
    """Endless random batches: the n-th is a function of n, whatever the number of ranks."""

    def __init__(self, *, rows: int = 8, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(labels=LABELS, shard=rank, num_shards=world_size)
        self._rows = rows

    def full_batch(self, number: int) -> Batch:
        return random_batch(self._rows, seed=number)


def tiny_run(**changes: object) -> Run:
    """Return a run of 20 steps of a tiny model, with some fields changed."""
    base = Run(
        name="tiny",
        data=TextData(
            corpus=CorpusFolder(path="none"),
            tokenizer=TrainedTokenizer(vocab_size=VOCABULARY),
            mixture=MixtureConfig(),
            loader=LoaderConfig(),
        ),
        model=tiny_model_config(),
        schedule=WSD(warmup=4),
        steps=20,
        log=LogConfig(every=4, routing_stats_every=3),
    )
    return base.replace(**changes)


def synthetic_run(**changes: object) -> Run:
    """Return a run of 20 steps on the synthetic languages with all real parts: some seconds.

    ``changes`` are fields of the run, or of its text data.
    """
    both = (WeightedTask(task=Translation()), WeightedTask(task=Denoising(), weight=0.5))
    base = Run(
        name="synthetic",
        data=TextData(
            corpus=BuiltCorpus(recipe=SMALL_SYNTHETIC_CORPUS),
            tokenizer=TrainedTokenizer(vocab_size=400, sample_lines=2000),
            mixture=MixtureConfig(tasks=both),
            loader=LoaderConfig(batch_tokens=512, max_source=64, max_target=64, bucket_window=256),
        ),
        model=tiny_model_config().replace(vocab_size=400),
        schedule=WSD(warmup=4),
        steps=20,
        checkpoint=CheckpointConfig(every=5),
        validation=ValidationConfig(every=10, rows=4),
        log=LogConfig(every=4, routing_stats_every=3),
    )
    return change_text(base, **changes)


def text_of(run: Run) -> TextData:
    """Return the data of a run on text."""
    return require_text(run.data, what="the test")


def change_text(run: Run, **changes: object) -> Run:
    """Return a run on text with some fields changed, of the run or of its ``TextData``."""
    of_text = {name: changes.pop(name) for name in TextData.model_fields if name in changes}
    return run.replace(data=run.data.replace(**of_text), **changes)


def tiny_trainer(run: Run, *, world: World | None = None) -> Trainer:
    """Return a trainer on random batches, seeded as a real one is."""
    return seeded_trainer(
        run,
        make_loader=lambda replica: TinyStream(rank=replica.rank, world_size=replica.num_replicas),
        world=world or SingleProcess(),
    )
