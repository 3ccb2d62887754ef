"""Our side of ``against_hf.py``: the trainer on the same batches."""

import json
import sys
import time
from itertools import cycle
from typing import Any

import torch
from random_pairs import CLIP, LR, SHAPE, SMOOTHING, STEPS, WARM, Pair, batches, real_tokens

from moesaic.data.batch import (
    IGNORE_LABEL,
    SOURCE_LANGUAGE,
    TARGET_LANGUAGE,
    TASK,
    Batch,
    InputRows,
)
from moesaic.distributed.world import SingleProcess
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.head import LanguageModelHead
from moesaic.model.transformer import Transformer
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm
from moesaic.nn.positional_encoding import Sinusoidal
from moesaic.optim.lr_schedule import Constant
from moesaic.optim.optimizer import AdamW
from moesaic.testing.tiny_models import tiny_run
from moesaic.train.trainer import Trainer


class Given:
    """A stream of given batches, over and over."""

    tasks = ("translation",)
    languages = ("deu_Latn",)

    def __init__(self, found: list[Batch]) -> None:
        self._found = cycle(found)

    def __next__(self) -> Batch:
        return next(self._found)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def padded(pairs: list[Pair]) -> Batch:
    """Return pairs as a batch; the decoder reads the target moved by one, after a start id."""
    zeros = torch.zeros(len(pairs), dtype=torch.int64)
    labels = InputRows.from_lists([target for _, target in pairs])
    return Batch(
        source=InputRows.from_lists([source for source, _ in pairs]),
        target=InputRows.from_lists([[1, *target[:-1]] for _, target in pairs]),
        labels=labels.values.where(labels.real, IGNORE_LABEL),
        groups=dict.fromkeys((TASK, SOURCE_LANGUAGE, TARGET_LANGUAGE), zeros),
        key=zeros,
    )


def model_config() -> ModelConfig:
    stack = Stack(layers=SHAPE["layers"], moe_every=0)
    return ModelConfig(
        vocab_size=SHAPE["vocab"],
        dim=SHAPE["dim"],
        encoder=stack,
        decoder=stack,
        attention=AttentionConfig(heads=SHAPE["heads"]),
        feed_forward=FeedForwardConfig(hidden=SHAPE["hidden"], activation=ReLU()),
        norm=LayerNorm(),
        position=Sinusoidal(),
        head=LanguageModelHead(label_smoothing=SMOOTHING),
        bias=True,
    )


def main(seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    found = batches(seed)
    run = tiny_run(
        model=model_config(),
        optimizer=AdamW(lr=LR, weight_decay=0.0),
        schedule=Constant(),
        clip_norm=CLIP,
        steps=WARM + STEPS,
    )
    trainer = Trainer(
        run,
        model=Transformer(run.model),
        data=Given([padded(b) for b in found]),
        world=SingleProcess(),
    )
    for _ in range(WARM):
        trainer.train_step()
    began = time.perf_counter()
    for _ in range(STEPS):
        trainer.train_step()
    speed = real_tokens(found[WARM:]) / (time.perf_counter() - began)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(json.dumps({"tokens_per_s": speed, "parameters": parameters}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
