"""A made-up corpus, its tokenizer and shards, shared by the tests of the data pipeline."""

import functools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from moesaic.corpus.corpus import Corpus
from moesaic.corpus.pair import Pair, Text
from moesaic.data.batch import IGNORE_LABEL, SOURCE_LANGUAGE, TARGET_LANGUAGE, TASK
from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.document_packing import Concatenated, DocumentPacking, Separated
from moesaic.data.loader import DataReplica, Loader, LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.ragged import Ragged
from moesaic.data.tasks import CausalLM, Denoising, Translation
from moesaic.data.token_shard_writer import write_shards
from moesaic.data.token_shards import TokenShards
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer

LANGUAGES = ("deu_Latn", "ell_Grek", "eng_Latn", "jpn_Jpan")
SIZES = {"deu_Latn": 300, "ell_Grek": 90, "jpn_Jpan": 30}
_ALPHABETS = {
    "eng_Latn": "aeiou",
    "deu_Latn": "äeöuß",
    "ell_Grek": "αβγδε",
    "jpn_Jpan": "あいうえお",
}


def sentence(language: str, number: int) -> str:
    """The same short text for the same number: 1 to 9 words."""
    letters = _ALPHABETS[language]
    words = [letters[(number + i) % 5] * (1 + (number * 7 + i) % 4) for i in range(1 + number % 9)]
    return f"{' '.join(words)} {number}"


class ToyCorpus:
    """English to three languages, sharing the English side; some Greek text on its own."""

    fingerprint = "toy"
    languages = LANGUAGES
    directions = tuple(("eng_Latn", code) for code in SIZES)

    def iter_pairs(self, source: str, target: str, *, split: str = "train") -> Iterable[Pair]:
        for i in self._numbers(target, split):
            yield Pair(sentence(source, i), sentence(target, i), source, target, "toy", "none")

    def iter_texts(self, code: str, *, split: str = "train") -> Iterable[Text]:  # noqa: ARG002
        if code == "ell_Grek":
            yield from (Text(f"{sentence(code, i)} δ", code) for i in range(20))

    def _numbers(self, target: str, split: str) -> range:
        size = SIZES[target]
        return {"train": range(size), "valid": range(1000, 1000 + size // 5)}.get(split, range(0))


@functools.cache
def tokenizer() -> Tokenizer:
    texts = {code: [sentence(code, i) for i in range(100)] for code in LANGUAGES}
    return train_tokenizer(texts, LANGUAGES, TrainedTokenizer(vocab_size=400, sample_lines=500))


@functools.cache
def shards() -> TokenShards:
    return write_shards(
        cast(Corpus, ToyCorpus()), tokenizer(), out=Path(tempfile.mkdtemp()) / "shards"
    )


MIXTURE = MixtureConfig(
    tasks=(
        WeightedTask(task=Translation(), weight=3.0),
        WeightedTask(task=Denoising(), weight=1.0),
    ),
    temperature=2.0,
)
SMALL = LoaderConfig(batch_tokens=256, bucket_window=64, max_source=40, max_target=40, prefetch=0)
PACKED = SMALL.replace(max_target=12, collator=DecoderOnlyCollator())


def packed(packing: DocumentPacking, **task: Any) -> MixtureConfig:
    """A language model's mixture."""
    return MixtureConfig(tasks=(WeightedTask(task=CausalLM(packing=packing, **task)),))


SETUPS: dict[str, dict[str, Any]] = {
    "whole texts": {"config": SMALL, "mixture": MIXTURE},
    "concatenated": {"config": PACKED, "mixture": packed(Concatenated())},
    "separated": {"config": PACKED, "mixture": packed(Separated())},
}


def loader(
    *,
    config: LoaderConfig = SMALL,
    mixture: MixtureConfig = MIXTURE,
    seed: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    return Loader(
        shards(),
        tokenizer=tokenizer(),
        mixture=mixture,
        config=config,
        seed=seed,
        replica=DataReplica(rank, world),
    )


def rows(batch) -> list[tuple]:
    """Every row without its padding, so that batches of other widths compare."""
    found = []
    for i in range(batch.rows):
        sides = (batch.source, batch.target)
        texts = [tuple(side.values[i, : side.lengths[i]].tolist()) for side in sides]
        texts.append(tuple(batch.labels[i][batch.labels[i] != IGNORE_LABEL].tolist()))
        labels = (batch.groups[name][i] for name in (TASK, SOURCE_LANGUAGE, TARGET_LANGUAGE))
        found.append((*texts, *(int(x) for x in labels)))
    return sorted(found)


def ragged(rows: Sequence[Sequence[int]]) -> Ragged:
    return Ragged.from_lists(rows)


def lists(rows: Ragged) -> list[list[int]]:
    return [part.tolist() for part in np.split(rows.tokens, np.cumsum(rows.lengths)[:-1])]


def read_every_row(found: TokenShards) -> None:
    """Read every row of every split, as training does."""
    for split in ("train", "valid", "test"):
        for source, target in found.directions:
            rows = found.pair_rows(source, target, split=split)
            for texts in rows.text_ids(np.arange(rows.size)):
                found.gather(texts)
        for code in found.languages:
            rows = found.text_rows(code, split=split)
            found.gather(rows.text_ids(np.arange(rows.size))[0])
