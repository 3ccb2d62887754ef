"""Corpus statistics: counts per direction and split, and a sample of pairs."""

import random
from dataclasses import dataclass

from moesaic.core.errors import DataError
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.pair import Pair
from moesaic.corpus.split import SPLITS


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Pairs of a split, and characters and words of each side."""

    pairs: int
    source_characters: int
    target_characters: int
    source_words: int
    target_words: int


@dataclass(frozen=True, slots=True)
class DirectionStats:
    """Counts of a direction: rows read, rows dropped by reason, and each split."""

    source: str
    target: str
    read: int
    dropped: dict[str, int]
    splits: dict[str, SplitCounts]

    @property
    def kept(self) -> int:
        return sum(part.pairs for part in self.splits.values())


@dataclass(frozen=True, slots=True)
class CorpusStats:
    """Statistics of a corpus: its directions, largest first, and what each drop reason means.

    ``domains`` are the held-out packages by split; ``missing`` are the packages that could not be
    downloaded, with the reason.
    """

    name: str
    directions: tuple[DirectionStats, ...]
    too_small: dict[str, int]
    reasons: dict[str, str]
    domains: dict[str, list[str]]
    missing: dict[str, str]

    @property
    def read(self) -> int:
        return sum(d.read for d in self.directions)

    @property
    def kept(self) -> int:
        return sum(d.kept for d in self.directions)

    @property
    def splits(self) -> dict[str, int]:
        """Pairs by split, over all directions: train, valid, test, then the domains."""
        names = (*SPLITS, *self.domains)
        return {s: sum(d.splits[s].pairs for d in self.directions) for s in names}

    def num_directions_with(self, pairs: int) -> int:
        """Return the number of directions with at least so many pairs."""
        return sum(d.kept >= pairs for d in self.directions)

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped pairs by reason, over all directions, largest first."""
        total = {r: sum(d.dropped.get(r, 0) for d in self.directions) for r in self.reasons}
        return {r: n for r, n in sorted(total.items(), key=lambda item: -item[1]) if n}


def corpus_stats(corpus: Corpus) -> CorpusStats:
    """Return the statistics of a corpus. Reads corpus.json only."""
    directions = [
        DirectionStats(
            d["source"],
            d["target"],
            d["read"],
            dict(d["dropped"]),
            {split: SplitCounts(**counts) for split, counts in d["splits"].items()},
        )
        for d in corpus.manifest["directions"]
    ]
    directions.sort(key=lambda d: (-d.kept, d.source, d.target))
    manifest = corpus.manifest
    return CorpusStats(
        corpus.name,
        tuple(directions),
        manifest["too_small"],
        manifest["reasons"],
        manifest.get("domains", {}),
        manifest.get("missing", {}),
    )


def sample_pairs(
    corpus: Corpus,
    *,
    source: str,
    target: str,
    split: str = "train",
    count: int = 10,
    seed: int = 0,
) -> list[Pair]:
    """Return ``count`` random pairs of a direction (or all, if it has fewer), in corpus order.

    Raises DataError when the corpus has no such direction, or it has no pairs in that split.
    """
    total = corpus.count(source, target, split=split)
    pairs = corpus.iter_pairs(source, target, split=split)
    wanted = set(random.Random(seed).sample(range(total), min(count, total)))
    found = [pair for i, pair in enumerate(pairs) if i in wanted]
    if not found:
        raise DataError(f"corpus {corpus.name}: no {split} pairs from {source} to {target}")
    return found
