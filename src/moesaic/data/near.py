"""NearDuplicates: what is done with held-out sources that are almost train sources.

A hash of the source keeps equal sources on one side of the split, but ``open the file`` and
``open the files`` may still fall on two. Likeness is the Jaccard index of the sets of character
3-grams of the split keys: shared grams over all grams.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Set

import numpy as np
from pydantic import Field

from moesaic.core.config import Choice

TRIGRAM = 3
_ROUNDING = 1e-9  # 3 of 5 shared grams are 0.6


class NearDuplicates(Choice):
    """Family: ``Keep`` or ``DropNear``. Only held-out rows are ever dropped."""

    @property
    @abstractmethod
    def enabled(self) -> bool:
        """Whether ``among`` must be asked at all."""

    @abstractmethod
    def find(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        """Return those of ``held`` that are too near to one of ``train``; all are split keys."""


class KeepNearDuplicates(NearDuplicates):
    """Near-duplicates stay in the test set: scores are partly a memory test."""

    @property
    def enabled(self) -> bool:
        return False

    def find(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        del held, train
        return frozenset()


class DropNearDuplicates(NearDuplicates):
    """Held-out rows whose source has a train source of any language this near are dropped."""

    threshold: float = Field(default=0.6, gt=0, le=1)

    @property
    def enabled(self) -> bool:
        return True

    def find(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        return find_near_duplicates(held, train=train, threshold=self.threshold)


def character_trigrams(text: str) -> frozenset[str]:
    """Return the character 3-grams of a text, its two ends marked by a space; never empty."""
    padded = f" {text} "
    return frozenset(padded[i : i + TRIGRAM] for i in range(max(1, len(padded) - TRIGRAM + 1)))


def jaccard(a: str, b: str) -> float:
    """Return the share of grams that two texts have in common: the definition, for one pair."""
    first, second = character_trigrams(a), character_trigrams(b)
    return len(first & second) / len(first | second)


def find_near_duplicates(held: Set[str], *, train: Iterable[str], threshold: float) -> frozenset[str]:
    """Return those of ``held`` with a text of ``train`` at ``jaccard >= threshold``. Exact.

    Only ``held`` is kept in memory; ``train`` is read once, a text at a time.
    """
    index = _TrigramIndex(held)
    found = np.zeros(len(index.texts), dtype=np.bool_)
    for text in train:
        found |= index.jaccard_with_all(text) >= threshold - _ROUNDING
    return frozenset(index.texts[i] for i in np.flatnonzero(found))


class _TrigramIndex:
    """Held-out texts by their grams: counting the lists of a text's grams counts what is shared."""

    def __init__(self, held: Set[str]) -> None:
        self.texts = sorted(held)
        lists: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(self.texts):
            for gram in character_trigrams(text):
                lists[gram].append(number)
        self._having = {gram: np.array(found, dtype=np.int32) for gram, found in lists.items()}
        self._sizes = np.array([len(character_trigrams(text)) for text in self.texts], dtype=np.int64)

    def jaccard_with_all(self, text: str) -> np.ndarray:
        """Return the Jaccard index of ``text`` with each held-out text, float64 [held]."""
        own = character_trigrams(text)
        lists = [self._having[gram] for gram in own if gram in self._having]
        if not lists:
            return np.zeros(len(self.texts))
        shared = np.bincount(np.concatenate(lists), minlength=len(self.texts))
        return shared / (self._sizes + len(own) - shared)
