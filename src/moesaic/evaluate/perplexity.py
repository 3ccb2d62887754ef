"""Perplexity and bits per byte of documents, by language and domain, with intervals.

Perplexity is ``exp(sum of nll / predicted tokens)``; a document's tokens and its end are predicted.
Bits per byte is ``sum of nll / (ln 2 * bytes of UTF-8)``: the one that two models with different
tokenizers can be compared by. Both are ratios of sums over documents, so their 95 % intervals are
of a bootstrap over documents (``bootstrap.py``).

Letters: N documents.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.files import write_json
from moesaic.corpus.languages import resolve_language
from moesaic.evaluate.bootstrap import ScoreInterval, bootstrap_resample

PERPLEXITY_FORMAT = 1


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """A document's summed negative log-likelihood in nats, predicted tokens and UTF-8 bytes."""

    nll: float
    tokens: int
    num_bytes: int
    language: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """Positions ``start`` to ``stop`` that a model reads at once, scored from ``first`` on."""

    start: int
    stop: int
    first: int


def sliding_windows(length: int, *, window: int, stride: int) -> Iterator[ScoredWindow]:
    """Yield the windows of a document of ``length`` positions: each position is scored once.

    A document of at most ``window`` positions is read whole. A longer one is read in windows that
    are ``stride`` apart, so that a scored position has at least ``window - stride`` before it.
    """
    start = scored = 0
    while scored < length:
        stop = min(start + window, length)
        yield ScoredWindow(start, stop, scored)
        start, scored = start + stride, stop


def _token_perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(sums[..., 0] / np.maximum(sums[..., 1], 1))


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / (math.log(2) * np.maximum(sums[..., 2], 1))


@dataclass(frozen=True, slots=True)
class GroupPerplexity:
    """The documents of a language and a domain; both empty: all documents."""

    language: str
    domain: str
    documents: int
    tokens: int
    num_bytes: int
    perplexity: ScoreInterval
    bits_per_byte: ScoreInterval

    @property
    def name(self) -> str:
        """The group's name: of its language, its domain or both."""
        language = resolve_language(self.language).name if self.language else ""
        return ", ".join(filter(None, (self.domain, language))) or "all documents"


@dataclass(frozen=True, slots=True)
class PerplexitySummary:
    """Groups of documents, all of them first; how they were read; notes."""

    run: str
    texts: str
    window: int
    stride: int
    groups: tuple[GroupPerplexity, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the content of perplexity.json."""
        return {
            "format": PERPLEXITY_FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **asdict(self),
            "groups": [{"name": group.name, **asdict(group)} for group in self.groups],
        }

    def write(self, path: Path) -> None:
        """Write perplexity.json, whole or not at all."""
        write_json(path, self.to_dict())


def group_perplexities(
    losses: Sequence[DocumentLoss], *, resamples: int = 1000, seed: int = 0
) -> tuple[GroupPerplexity, ...]:
    """Return perplexities of all documents, of each language, each domain, and each pair of them.

    A group that equals a larger one is left out: of one language, say, there is no second row.
    """
    members: dict[tuple[str, str], list[DocumentLoss]] = defaultdict(list)
    for loss in losses:
        for language in ("", loss.language):
            for domain in dict.fromkeys(("", loss.domain)):
                members[language, domain].append(loss)
    found, sizes = [], set[tuple[int, ...]]()
    for language, domain in sorted(members, key=lambda key: (bool(key[0]) + bool(key[1]), key)):
        group = members[language, domain]
        same = tuple(map(id, group))
        if same not in sizes:
            sizes.add(same)
            found.append(_group(language, domain, group, resamples=resamples, seed=seed))
    return tuple(found)


def _group(
    language: str, domain: str, losses: Sequence[DocumentLoss], *, resamples: int, seed: int
) -> GroupPerplexity:
    statistics = np.array([[d.nll, d.tokens, d.num_bytes] for d in losses], dtype=np.float64)
    scores = [
        bootstrap_resample(score, statistics=statistics, resamples=resamples, seed=seed)
        for score in (_token_perplexity, _bits_per_byte)
    ]
    sums = statistics.sum(0)
    intervals = [score.confidence_interval() for score in scores]
    return GroupPerplexity(language, domain, len(losses), int(sums[1]), int(sums[2]), *intervals)
