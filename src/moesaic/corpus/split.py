"""Train, valid and test split by a hash of the source text, without leakage between them.

The hash is of the normalised source alone (``split_key``): the split is the same in every language,
whatever else the corpus holds, and two sources that differ only in case, punctuation, digits or
placeholders are on the same side.

``open the file`` and ``open the files`` may still be on two sides. Such near-duplicates are kept or
dropped (``NearDuplicates``) by the Jaccard index of the sets of character 3-grams of the split
keys: shared 3-grams over all 3-grams.
"""

import fnmatch
import math
import unicodedata
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moesaic.core.config import Choice, Config
from moesaic.core.errors import DataError, did_you_mean, listed
from moesaic.corpus.placeholders import without_placeholders
from moesaic.corpus.readers.text_lines import read_lines

TRIGRAM = 3
_ROUNDING = 1e-9  # 3 of 5 shared 3-grams are 0.6


class NearDuplicates(Choice):
    """What happens to held-out sources that are almost equal to a train source.

    Family: ``KeepNearDuplicates`` or ``DropNearDuplicates``. Train rows are never dropped.
    """

    enabled: ClassVar[bool] = True

    @abstractmethod
    def find(self, held_out: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        """Return the split keys of ``held_out`` that are too close to one of ``train``."""


class KeepNearDuplicates(NearDuplicates):
    """Keep near-duplicates in the test set: scores then measure memorisation in part."""

    enabled: ClassVar[bool] = False

    def find(self, held_out: Set[str], *, train: Iterable[str]) -> frozenset[str]:  # noqa: ARG002
        return frozenset()


class DropNearDuplicates(NearDuplicates):
    """Drop held-out rows with a train source, of any language, at least this similar.

    Similarity is the Jaccard index of the sets of character 3-grams of the split keys.
    """

    threshold: float = Field(default=0.6, gt=0, le=1)

    def find(self, held_out: Set[str], *, train: Iterable[str]) -> frozenset[str]:
        """Exact. Only ``held_out`` is kept in memory; ``train`` is read once, a text at a time.

        Compared are texts that share one of their rarest 3-grams: not every pair.
        """
        index = _RareTrigramIndex(held_out, self.threshold - _ROUNDING)
        for text in train:
            index.find_near(text)
        return frozenset(index.found)


def character_trigrams(text: str) -> frozenset[str]:
    """Return the character 3-grams of a text, padded with a space at both ends; never empty."""
    padded = f" {text} "
    return frozenset(padded[i : i + TRIGRAM] for i in range(max(1, len(padded) - TRIGRAM + 1)))


class _RareTrigramIndex:
    """An inverted index of the rarest 3-grams of the texts that are not found yet.

    Sets of m and n elements whose Jaccard index is at least t share t max(m, n) of them or more. In
    one order of all 3-grams, each then has a shared one among its first n - ceil(t n) + 1: with the
    rarest first, few texts share one (prefix filtering, Bayardo et al. 2007, WWW).
    """

    def __init__(self, texts: Set[str], threshold: float) -> None:
        self.threshold = threshold
        self.found: set[str] = set()
        self.compared = 0
        grams = {text: character_trigrams(text) for text in texts}
        self._count = Counter(gram for found in grams.values() for gram in found)
        self._texts: dict[str, set[str]] = defaultdict(set)
        for text, of_text in grams.items():
            for gram in self._rarest(of_text):
                self._texts[gram].add(text)

    def find_near(self, text: str) -> None:
        """Add to ``found`` what is at least as similar to ``text`` as the threshold."""
        grams = character_trigrams(text)
        lists = [self._texts[gram] for gram in self._rarest(grams) if gram in self._texts]
        for candidate in set().union(*lists):
            theirs = character_trigrams(candidate)
            self.compared += 1
            shared = len(grams & theirs)
            if shared >= self.threshold * (len(grams) + len(theirs) - shared):
                self.found.add(candidate)
                for gram in self._rarest(theirs):
                    self._texts[gram].discard(candidate)

    def _rarest(self, grams: frozenset[str]) -> list[str]:
        kept = len(grams) - math.ceil(self.threshold * len(grams)) + 1
        return sorted(grams, key=lambda gram: (self._count[gram], gram))[:kept]


SPLITS = ("train", "valid", "test")
SplitName = Literal["train", "valid", "test"]


class _LetterTable(dict[int, str]):
    """A translation table: letters and combining marks stay, all else becomes a space."""

    def __missing__(self, point: int) -> str:
        char = chr(point)
        self[point] = char if unicodedata.category(char)[0] in "LM" else " "
        return self[point]


_LETTERS = _LetterTable()


class HeldOutDomain(Config):
    """Packages or files held out whole, as an out-of-domain test.

    ``packages`` are origins (``a/messages.po``), base names of origins (``messages.po``: every file
    of that name), or patterns of either (``wesnoth-*``); each must match something. All their rows
    form a split called ``name``; none is used for training.
    """

    name: str = Field(pattern=r"^[A-Za-z][\w-]*$")
    packages: tuple[str, ...] = Field(min_length=1)

    def contains(self, origin: str) -> bool:
        """Whether rows of this origin belong to the domain."""
        return any(matches_origin(pattern, origin) for pattern in self.packages)


def matches_origin(pattern: str, origin: str) -> bool:
    """Whether a pattern of a domain is, or matches, an origin or its base name."""
    names = (origin, origin.rpartition("/")[2])
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


class SplitConfig(Config):
    """Fractions of sources in test and valid; another ``salt`` draws another split.

    ``domains`` are held out whole; ``near_duplicates`` keeps or drops held-out sources that are
    almost equal to a train source.
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
            raise ValueError(f"two splits have the name {', '.join(twice)}: rename the domain")
        return self

    def check_domains(self, origins: Iterable[str]) -> None:
        """Raise DataError unless every pattern of a domain matches one of the origins."""
        known = sorted(set(origins))
        for domain in self.domains:
            for pattern in domain.packages:
                if not any(matches_origin(pattern, origin) for origin in known):
                    names = [*known, *(origin.rpartition("/")[2] for origin in known)]
                    raise DataError(
                        f'domain {domain.name}: nothing is from "{pattern}", so nothing would be '
                        f"held out; read were {listed(known)}{did_you_mean(pattern, names)}"
                    )

    def domain_of(self, origin: str) -> str:
        """Return the name of the domain that rows of this origin belong to; empty for none."""
        return next((domain.name for domain in self.domains if domain.contains(origin)), "")

    def split_of(self, source: str) -> SplitName:
        """Return the split of a source text."""
        return self._split_at(_unit_hash(source, self.salt))

    def split_of_text(self, text: str) -> SplitName:
        """Return the split of a text in one language: as of a source, without keeping the text."""
        return self._split_at(_compute_unit_hash(text, self.salt))

    def _split_at(self, point: float) -> SplitName:
        if point < self.test:
            return "test"
        return "valid" if point < self.test + self.valid else "train"

    def held_out_split_of(self, source: str) -> SplitName:
        """Return valid or test, in proportion to their fractions, for a row that is not train."""
        share = self.test / (self.test + self.valid) if self.test + self.valid else 0.5
        return "test" if _unit_hash(source, self.salt) < share else "valid"


def _compute_unit_hash(source: str, salt: str) -> float:
    return digest64(f"{salt}\0{split_key(source)}") / 2**64


# a source recurs in every language; documents are long, and do not
_unit_hash = lru_cache(maxsize=1 << 16)(_compute_unit_hash)


def split_key(text: str) -> str:
    """Return a text without case, punctuation, digits and placeholders."""
    plain = unicodedata.normalize("NFKC", without_placeholders(text)).casefold()
    return " ".join(plain.translate(_LETTERS).split()) or text.casefold()


def digest64(text: str) -> int:
    """Return a 64-bit hash that is the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class LeakedSources:
    """Digests of held-out split keys that equal a train key, or are near-duplicates of one."""

    exact: frozenset[int] = frozenset()
    near: frozenset[int] = frozenset()


def find_leaks(keys: Path, *, near_duplicates: NearDuplicates) -> LeakedSources:
    """Compare the held-out keys of a file (``h`` and a key per line) with its train keys (``t``).

    Memory: the held-out keys, a digest of each distinct train key, and the 3-gram index.
    """
    held_out = {line[1:] for _, line in read_lines(keys) if line[:1] == "h"}
    exact = {line[1:] for _, line in read_lines(keys) if line[:1] == "t" and line[1:] in held_out}
    close = (
        near_duplicates.find(held_out - exact, train=_train_keys(keys))
        if near_duplicates.enabled
        else frozenset[str]()
    )
    return LeakedSources(frozenset(map(digest64, exact)), frozenset(map(digest64, close)))


def _train_keys(keys: Path) -> Iterator[str]:
    """Yield every distinct train key, in order of first occurrence."""
    seen: set[int] = set()
    for _, line in read_lines(keys):
        digest = digest64(line)
        if line[:1] == "t" and digest not in seen:
            seen.add(digest)
            yield line[1:]
