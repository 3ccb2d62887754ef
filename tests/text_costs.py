"""Counted work of reading texts: a rank's loader, as the corpus grows."""

import tempfile
import tracemalloc
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pipeline_cases as cases
from cost_counters import CostLaw, OperationCounter, open_files
from moesaic.data.loader import DataReplica, Loader
from moesaic.data.token_shard_writer import write_shards
from moesaic.data.token_shards import TokenShards
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.simulation import fake_process_group


@dataclass(frozen=True, slots=True)
class LoaderWork:
    """What a rank's loader does to open a corpus and make a batch."""

    operations: int
    held_bytes: int
    sent_bytes: int
    messages: int
    files: int


@cache
def loader_work(texts: int) -> LoaderWork:
    """Count the second batch of a corpus with so many texts of each of three languages."""
    sizes = patch.dict(cases.SIZES, dict.fromkeys(cases.SIZES, texts))
    with tempfile.TemporaryDirectory() as folder, sizes, fake_process_group(2):
        corpus: Any = cases.ToyCorpus()
        write_shards(corpus, cases.tokenizer(), out=Path(folder) / "shards")
        before = open_files()
        tracemalloc.start()
        try:
            loader = Loader(
                TokenShards.open(Path(folder) / "shards"),
                tokenizer=cases.tokenizer(),
                mixture=cases.MIXTURE,
                config=cases.SMALL,
                seed=1,
                replica=DataReplica(0, 2),
            )
            next(loader)
            with OperationCounter() as done, CommunicationCounter() as sent:
                next(loader)
            held = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        return LoaderWork(
            done.total,
            held,
            sent.total_bytes(),
            sent.calls().total(),
            open_files() - before,
        )


SIZE = 400


def texts_laws() -> dict[str, CostLaw]:
    """A batch costs the same out of n texts."""

    def law(work: str) -> CostLaw:
        return CostLaw(
            lambda n: getattr(loader_work(n), work),
            lambda _: getattr(loader_work(SIZE), work),
            size=SIZE,
        )

    works = {
        "operations": "operations",
        "bytes held": "held_bytes",
        "bytes sent": "sent_bytes",
        "messages": "messages",
        "files": "files",
    }
    return {f"{name} of a batch out of n texts": law(work) for name, work in works.items()}
