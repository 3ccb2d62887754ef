"""One side of ``step_between_commits.py``: training steps of the demo's model on random batches.

It uses names only that older commits have, too.
"""

import sys
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from decoding_worker import serve

from moesaic.data.batch import Batch
from moesaic.distributed.world import SingleProcess
from moesaic.model.transformer import Transformer
from moesaic.recipes.lookup import find_recipe
from moesaic.testing.tiny_models import TinyStream, random_batch, tiny_run
from moesaic.train.trainer import Trainer

BATCHES, ROWS, LENGTH = 8, 96, 40  # about 4,096 tokens a batch, as the demo's


class Repeated(TinyStream):
    """The same few batches, over and over."""

    def __init__(self) -> None:
        super().__init__()
        self._found = cycle([random_batch(ROWS, seed=n, length=LENGTH) for n in range(BATCHES)])

    def __next__(self) -> Batch:
        return next(self._found)


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    demo = find_recipe("demo")
    run = tiny_run(model=demo.model, optimizer=demo.optimizer, steps=100_000)
    model = Transformer(run.model)
    trainer = Trainer(run, model=model, data=Repeated(), world=SingleProcess())

    def prepare(asked: dict[str, Any]) -> Callable[[], object]:
        def steps() -> None:
            for _ in range(asked["steps"]):
                trainer.train_step()

        return steps

    serve(prepare, parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
