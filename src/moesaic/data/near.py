"""NearDuplicates: what is done with held-out sources that are almost train sources.

A hash of the source keeps equal sources on one side of the split, but ``open the file`` and
``open the files`` may still fall on two. Likeness is the Jaccard index of the sets of character
3-grams of the split keys: shared grams over all grams.
"""

import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Set

from pydantic import Field

from moesaic.core.config import Choice

GRAM = 3
_ROUNDING = 1e-9  # 0.6 * 5 must not need 4 shared grams


class NearDuplicates(Choice):
    """Family: ``Keep`` or ``DropNear``. Only held-out rows are ever dropped."""

    @property
    @abstractmethod
    def looks(self) -> bool:
        """Whether ``among`` must be asked at all."""

    @abstractmethod
    def among(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        """Return those of ``held`` that are too near to one of ``train``; all are split keys."""


class Keep(NearDuplicates):
    """Near-duplicates stay in the test set: scores are partly a memory test."""

    @property
    def looks(self) -> bool:
        return False

    def among(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        del held, train
        return frozenset()


class DropNear(NearDuplicates):
    """Held-out rows whose source has a train source of any language this near are dropped."""

    threshold: float = Field(default=0.6, gt=0, le=1)

    @property
    def looks(self) -> bool:
        return True

    def among(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        return near(held, train=train, threshold=self.threshold)


def grams(text: str) -> frozenset[str]:
    """Return the character 3-grams of a text, its two ends marked by a space; never empty."""
    padded = f" {text} "
    return frozenset(padded[i : i + GRAM] for i in range(max(1, len(padded) - GRAM + 1)))


def jaccard(a: str, b: str) -> float:
    """Return the share of grams that two texts have in common: the definition, for one pair."""
    first, second = grams(a), grams(b)
    return len(first & second) / len(first | second)


def near(held: Set[str], *, train: Iterable[str], threshold: float) -> frozenset[str]:
    """Return those of ``held`` with a text of ``train`` at ``jaccard >= threshold``. Exact.

    By prefix filtering (Chaudhuri, Ganti, Kaushik 2006; Xiao et al. 2008): with grams ordered from
    rare to common, two sets that are near share one among the first of each. Only ``held`` is kept
    in memory; ``train`` is read once.
    """
    index = _Index(held, threshold=threshold)
    found: set[int] = set()
    for text in train:
        found |= index.near(text, known=found)
    return frozenset(index.texts[i] for i in found)


class _Index:
    """Held-out texts by the rarest of their grams. A gram is its rank, rarest first."""

    def __init__(self, held: Set[str], *, threshold: float) -> None:
        self.texts = sorted(held)
        self._threshold = threshold
        seen = Counter(gram for text in self.texts for gram in grams(text))
        order = sorted(seen, key=lambda gram: (seen[gram], gram))
        self._rank = {gram: rank for rank, gram in enumerate(order)}
        self._ranks = [tuple(sorted(self._rank[g] for g in grams(t))) for t in self.texts]
        self._by_gram: dict[int, list[int]] = defaultdict(list)
        for number, ranks in enumerate(self._ranks):
            for rank in ranks[: self._prefix(len(ranks))]:
                self._by_gram[rank].append(number)

    def near(self, text: str, *, known: Set[int]) -> set[int]:
        """Numbers of the texts near to this one, without those ``known`` already."""
        own = grams(text)
        ranks = sorted(self._rank[g] for g in own if g in self._rank)
        # grams that no held-out text has are rarer than all others: they fill the prefix first
        first = max(0, self._prefix(len(own)) - (len(own) - len(ranks)))
        candidates = {n for rank in ranks[:first] for n in self._by_gram.get(rank, ())} - known
        inside = set(ranks) if candidates else set()
        return {n for n in candidates if self._are_near(self._ranks[n], inside, size=len(own))}

    def _are_near(self, held: tuple[int, ...], other: set[int], *, size: int) -> bool:
        longer = max(len(held), size)
        if min(len(held), size) < self._threshold * longer - _ROUNDING:
            return False
        shared = len(other.intersection(held))
        return shared >= self._threshold * (len(held) + size - shared) - _ROUNDING

    def _prefix(self, size: int) -> int:
        return size - math.ceil(self._threshold * size - _ROUNDING) + 1
