"""Tiny models and batches: small enough for a law to train them in milliseconds."""

from collections.abc import Iterator
from dataclasses import fields

import torch

from moesaic.core.shapes import Tensor
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.sources.synthetic import SyntheticLanguages
from moesaic.data.batch import PAD, Batch
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Denoising, Translation
from moesaic.data.train_tokenizer import TokenizerConfig
from moesaic.distributed.world import SingleProcess, World
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.balance import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE, SparseLayer
from moesaic.moe.select import SwitchTop1
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.lr_schedule import WSD
from moesaic.train.random_state import seed_rank
from moesaic.train.run import (
    BuiltCorpus,
    CheckpointConfig,
    CorpusFolder,
    LogConfig,
    Run,
    ValidationConfig,
)
from moesaic.train.trainer import Trainer

VOCABULARY = 64
TASKS = ("translation", "denoising")
LANGUAGES = ("deu_Latn", "ell_Grek", "fra_Latn")
SMALL_SYNTHETIC_CORPUS = CorpusRecipe(name="few-phrases", source=SyntheticLanguages(phrases=500))
BALANCED_TOP1 = MoE(experts=4, select=SwitchTop1(), balance=(SwitchBalance(), RouterZLoss()))


def tiny_model_config(*, moe: SparseLayer = BALANCED_TOP1, layers: int = 1) -> ModelConfig:
    """Return an encoder-decoder of ``layers`` layers each, experts in every one.

    A rule that is not causal stands in the encoder alone, beside the usual one in the decoder.
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
    draw = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        tokens = torch.randint(5, VOCABULARY, (rows, length), generator=draw)
        lengths = torch.randint(2, length + 1, (rows, 1), generator=draw)
        return torch.where(torch.arange(length) < lengths, tokens, PAD)

    target = ids()
    return Batch(
        source=ids(),
        target_in=target,
        target_out=target.roll(-1, dims=1).where(target != PAD, PAD),
        task=torch.randint(len(TASKS), (rows,), generator=draw),
        source_language=torch.randint(len(LANGUAGES), (rows,), generator=draw),
        target_language=torch.randint(len(LANGUAGES), (rows,), generator=draw),
        key=torch.randint(2**62, (rows,), generator=draw),
    )


def shard_batch(batch: Batch, *, rank: int, world_size: int) -> Batch:
    """Return every ``world``-th row, from ``rank`` on."""
    return Batch(
        **{field.name: getattr(batch, field.name)[rank::world_size] for field in fields(Batch)}
    )


class TinyStream:
    """Endless random batches: the n-th is a function of n, whatever the number of ranks."""

    tasks = TASKS
    languages = LANGUAGES

    def __init__(self, *, rows: int = 8, rank: int = 0, world_size: int = 1) -> None:
        self._rows, self._rank, self._world = rows, rank, world_size
        self.drawn = 0
        self.skipped: dict[str, int] = {}

    def __next__(self) -> Batch:
        self.drawn += 1
        whole = random_batch(self._rows, seed=self.drawn)
        return shard_batch(whole, rank=self._rank, world_size=self._world)

    def state(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def held_out_batches(self, split: str, *, rows: int | None) -> Iterator[Batch]:
        del split, rows
        yield shard_batch(random_batch(self._rows, seed=0), rank=self._rank, world_size=self._world)

    def close(self) -> None: ...

    def restore(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def tiny_run(**changes: object) -> Run:
    """Return a run of 20 steps of a tiny model, with some fields changed."""
    base = Run(
        name="tiny",
        corpus=CorpusFolder(path="none"),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
        mixture=MixtureConfig(),
        loader=LoaderConfig(),
        model=tiny_model_config(),
        schedule=WSD(warmup=4),
        steps=20,
        log=LogConfig(every=4, routing_stats_every=3),
    )
    return base.replace(**changes)


def synthetic_run(**changes: object) -> Run:
    """Return a run of 20 steps on the made-up languages: all of the real parts, some seconds."""
    both = (WeightedTask(task=Translation()), WeightedTask(task=Denoising(), weight=0.5))
    base = Run(
        name="synthetic",
        corpus=BuiltCorpus(recipe=SMALL_SYNTHETIC_CORPUS),
        tokenizer=TokenizerConfig(vocab_size=400, sample_lines=2000),
        mixture=MixtureConfig(tasks=both),
        loader=LoaderConfig(batch_tokens=512, max_source=64, max_target=64, bucket_window=256),
        model=tiny_model_config().replace(vocab_size=400),
        schedule=WSD(warmup=4),
        steps=20,
        checkpoint=CheckpointConfig(every=5),
        validation=ValidationConfig(every=10, rows=4),
        log=LogConfig(every=4, routing_stats_every=3),
    )
    return base.replace(**changes)


def tiny_trainer(run: Run, *, world: World | None = None) -> Trainer:
    """Return a trainer on random batches, seeded as a real one is."""
    world = world or SingleProcess()
    torch.manual_seed(run.seed)
    model = Transformer(run.model)
    seed_rank(run.seed, world=world)
    part, parts = run.parallel.plan.resolve(world.size).data_shard(world.rank)
    return Trainer(run, model=model, data=TinyStream(rank=part, world_size=parts), world=world)
