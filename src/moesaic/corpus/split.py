"""NearDuplicates: what is done with held-out sources that are almost train sources.

A hash of the source keeps equal sources on one side of the split, but ``open the file`` and
``open the files`` may still fall on two. Likeness is the Jaccard index of the sets of character
3-grams of the split keys: shared grams over all grams.

Split: train, valid or test, decided by a hash of the normalised source alone.

So the split is the same in every language, whatever else the corpus holds, and two sources that
differ only in case, punctuation, digits or placeholders never stand on two sides of it.

Leaks: which held-out sources training has seen, exactly or nearly, in any direction.
"""

import fnmatch
import unicodedata
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from moesaic.core.config import Choice, Config
from moesaic.corpus.markup import without_placeholders
from moesaic.corpus.readers.text_lines import read_lines

TRIGRAM = 3


_ROUNDING = 1e-9  # 3 of 5 shared grams are 0.6


class NearDuplicates(Choice):
    """What happens to held-out sources that are almost equal to a train source.

    Family: ``KeepNearDuplicates`` or ``DropNearDuplicates``. Train rows are never dropped.
    """

    enabled: ClassVar[bool] = True

    @abstractmethod
    def find(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        """Return the split keys of ``held`` that are too close to one of ``train``."""


class KeepNearDuplicates(NearDuplicates):
    """Keep near-duplicates in the test set: scores then measure memorisation in part."""

    enabled: ClassVar[bool] = False

    def find(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:  # noqa: ARG002
        return frozenset()


class DropNearDuplicates(NearDuplicates):
    """Drop held-out rows with a train source, of any language, at least this similar.

    Similarity is the Jaccard index of the sets of character 3-grams of the split keys.
    """

    threshold: float = Field(default=0.6, gt=0, le=1)

    def find(self, held: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        """Exact. Only ``held`` is kept in memory; ``train`` is read once, a text at a time."""
        index = _TrigramIndex(held)
        found = np.zeros(len(index.texts), dtype=np.bool_)
        for text in train:
            found |= index.jaccard_with_all(text) >= self.threshold - _ROUNDING
        return frozenset(index.texts[i] for i in np.flatnonzero(found))


def character_trigrams(text: str) -> frozenset[str]:
    """Return the character 3-grams of a text, its two ends marked by a space; never empty."""
    padded = f" {text} "
    return frozenset(padded[i : i + TRIGRAM] for i in range(max(1, len(padded) - TRIGRAM + 1)))


def jaccard(a: str, b: str) -> float:
    """Return the share of grams that two texts have in common: the definition, for one pair."""
    first, second = character_trigrams(a), character_trigrams(b)
    return len(first & second) / len(first | second)


class _TrigramIndex:
    """Held-out texts by their grams: counting the lists of a text's grams counts what is shared."""

    def __init__(self, held: Set[str]) -> None:
        self.texts = sorted(held)
        lists: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(self.texts):
            for gram in character_trigrams(text):
                lists[gram].append(number)
        self._having = {gram: np.array(found, dtype=np.int32) for gram, found in lists.items()}
        self._sizes = np.array(
            [len(character_trigrams(text)) for text in self.texts], dtype=np.int64
        )

    def jaccard_with_all(self, text: str) -> np.ndarray:
        """Return the Jaccard index of ``text`` with each held-out text, float64 [held]."""
        own = character_trigrams(text)
        lists = [self._having[gram] for gram in own if gram in self._having]
        if not lists:
            return np.zeros(len(self.texts))
        shared = np.bincount(np.concatenate(lists), minlength=len(self.texts))
        return shared / (self._sizes + len(own) - shared)


SPLITS = ("train", "valid", "test")


SplitName = Literal["train", "valid", "test"]


class _LetterTable(dict[int, str]):
    """Letters and their marks as they are, all else a space."""

    def __missing__(self, point: int) -> str:
        char = chr(point)
        self[point] = char if unicodedata.category(char)[0] in "LM" else " "
        return self[point]


_LETTERS = _LetterTable()


class HeldOutDomain(Config):
    """Packages (names or patterns such as ``wesnoth-*``) that never train.

    All their rows are a test set of their own, a split called ``name``: text of a kind that
    training has not seen, where the test split is more of the same.
    """

    name: str = Field(pattern=r"^[A-Za-z][\w-]*$")
    packages: tuple[str, ...] = Field(min_length=1)

    def contains(self, origin: str) -> bool:
        """Whether rows of this origin belong here."""
        return any(fnmatch.fnmatchcase(origin, pattern) for pattern in self.packages)


class SplitConfig(Config):
    """Shares of 1 that go to test and valid; ``salt`` draws another split.

    ``domains`` are held out whole; ``near`` says what becomes of held-out sources that are almost
    train sources.
    """

    test: float = Field(default=0.10, ge=0, lt=1)
    valid: float = Field(default=0.05, ge=0, lt=1)
    salt: str = ""
    near_duplicates: NearDuplicates = KeepNearDuplicates()
    domains: tuple[HeldOutDomain, ...] = ()

    @model_validator(mode="after")
    def _leaves_something(self) -> "SplitConfig":
        if self.test + self.valid >= 1:
            raise ValueError(f"test={self.test} and valid={self.valid} leave nothing to train on")
        names = [*SPLITS, *(domain.name for domain in self.domains)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two splits are called {', '.join(twice)}: name the domain otherwise")
        return self

    def domain_of(self, origin: str) -> str:
        """Return the name of the domain that rows of this origin belong to; empty for none."""
        return next((domain.name for domain in self.domains if domain.contains(origin)), "")

    def split_of(self, source: str) -> SplitName:
        """Return the split of a source text."""
        place = self._unit_hash(source)
        if place < self.test:
            return "test"
        return "valid" if place < self.test + self.valid else "train"

    def held_out_split_of(self, source: str) -> SplitName:
        """Return valid or test, in the proportion of their shares, for a row that is not train."""
        share = self.test / (self.test + self.valid) if self.test + self.valid else 0.5
        return "test" if self._unit_hash(source) < share else "valid"

    def _unit_hash(self, source: str) -> float:
        return _unit_hash(source, self.salt)


@lru_cache(maxsize=1 << 16)  # a source recurs in every language
def _unit_hash(source: str, salt: str) -> float:
    return digest64(f"{salt}\0{split_key(source)}") / 2**64


def split_key(text: str) -> str:
    """Return what is left when case, punctuation, digits and placeholders are ignored."""
    plain = unicodedata.normalize("NFKC", without_placeholders(text)).casefold()
    return " ".join(plain.translate(_LETTERS).split()) or text.casefold()


def digest64(text: str) -> int:
    """Return a 64-bit hash that is the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class LeakedSources:
    """Digests of split keys: those that are train keys too, and those that are almost one."""

    exact: frozenset[int] = frozenset()
    near: frozenset[int] = frozenset()


def find_leaks(keys: Path, *, near_duplicates: NearDuplicates) -> LeakedSources:
    """Compare the held-out keys of a file (``h`` and a key per line) with its train keys (``t``).

    Memory holds the held-out keys and a number for each different train key, beside what ``near``
    holds.
    """
    held = {line[1:] for _, line in read_lines(keys) if line[:1] == "h"}
    exact = {line[1:] for _, line in read_lines(keys) if line[:1] == "t" and line[1:] in held}
    close = (
        near_duplicates.find(held - exact, train=_train_keys(keys))
        if near_duplicates.enabled
        else frozenset[str]()
    )
    return LeakedSources(frozenset(map(digest64, exact)), frozenset(map(digest64, close)))


def _train_keys(keys: Path) -> Iterator[str]:
    """Every different train key, in the order first seen."""
    seen: set[int] = set()
    for _, line in read_lines(keys):
        mark = digest64(line)
        if line[:1] == "t" and mark not in seen:
            seen.add(mark)
            yield line[1:]
