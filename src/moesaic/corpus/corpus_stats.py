"""Corpus statistics: counts per direction and split, and a sample of pairs."""

import random
from dataclasses import dataclass

from moesaic.core.errors import DataError
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_manifest import CorpusManifest, DirectionEntry, TextEntry
from moesaic.corpus.dropped_rows import DroppedRow, read_dropped
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.split import SPLITS


@dataclass(frozen=True, slots=True)
class CorpusStats:
    """Statistics of a corpus: its directions and texts, largest first, and why rows are dropped.

    ``domains`` are the held-out packages by split; ``missing`` are the packages and files that
    could not be read, ``empty`` the files without a row, each with the reason.
    """

    name: str
    directions: tuple[DirectionEntry, ...]
    texts: dict[str, TextEntry]
    too_small: dict[str, int]
    reasons: dict[str, str]
    domains: dict[str, list[str]]
    missing: dict[str, str]
    empty: dict[str, str]

    @property
    def read(self) -> int:
        """Pairs read."""
        return sum(d.rows_read for d in self.directions)

    @property
    def kept(self) -> int:
        """Pairs kept."""
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
        """Dropped pairs and texts by reason, largest first."""
        rows = (*self.directions, *self.texts.values())
        total = {r: sum(d.dropped.get(r, 0) for d in rows) for r in self.reasons}
        return {r: n for r, n in sorted(total.items(), key=lambda item: -item[1]) if n}


def corpus_stats(corpus: Corpus) -> CorpusStats:
    """Return the statistics of a corpus. Reads corpus.json only."""
    manifest = CorpusManifest.model_validate(corpus.manifest)
    directions = sorted(manifest.directions, key=lambda d: (-d.kept, d.source, d.target))
    texts = sorted(manifest.texts.items(), key=lambda item: (-item[1].kept, item[0]))
    return CorpusStats(
        corpus.name,
        tuple(directions),
        dict(texts),
        manifest.too_small,
        manifest.reasons,
        manifest.domains,
        manifest.missing,
        manifest.empty,
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


def sample_texts(
    corpus: Corpus, *, language: str = "", split: str = "train", count: int = 10, seed: int = 0
) -> list[Text]:
    """Return ``count`` random texts of a language (empty: of all), in corpus order.

    One pass over the corpus, with the chosen texts in memory (reservoir sampling: Vitter 1985,
    doi:10.1145/3147.3165). Raises DataError when there is none.
    """
    draw = random.Random(seed)
    kept: list[tuple[int, Text]] = []
    codes = [language] if language else corpus.languages
    texts = (text for code in codes for text in corpus.iter_texts(code, split=split))
    for number, text in enumerate(texts):
        place = number if number < count else draw.randrange(number + 1)
        if place < count:
            kept[place : place + 1] = [(number, text)]
    if not kept:
        raise DataError(
            f"corpus {corpus.name}: no {split} texts{f' in {language}' * bool(language)}"
        )
    return [text for _, text in sorted(kept, key=lambda item: item[0])]


@dataclass(frozen=True, slots=True)
class DroppedFilter:
    """Which dropped rows to show: of a reason, from and to a language (codes); empty for any."""

    reason: str = ""
    source: str = ""
    target: str = ""

    def takes(self, row: DroppedRow) -> bool:
        """Whether a row is wanted; a text counts as from and into its language."""
        source, _, target = row.direction.partition("-")
        return (
            self.reason in ("", row.reason)
            and self.source in ("", source)
            and self.target in ("", target or source)
        )


def sample_dropped(corpus: Corpus, wanted: DroppedFilter, *, count: int) -> list[DroppedRow]:
    """Return the first ``count`` dropped rows of each reason, those of the largest number first.

    Raises DataError where a corpus of an earlier version has no dropped rows beside it.
    """
    found: dict[str, list[DroppedRow]] = {}
    for row in read_dropped(corpus.path):
        if wanted.takes(row):
            found.setdefault(row.reason, []).append(row)
    order = list(corpus_stats(corpus).dropped)
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return [row for name in names for row in found[name][:count]]
