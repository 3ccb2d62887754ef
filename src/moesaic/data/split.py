"""Split: train, valid or test, decided by a hash of the normalised source alone.

So the split is the same in every language, whatever else the corpus holds, and two sources that
differ only in case, punctuation, digits or placeholders never stand on two sides of it.
"""

import fnmatch
import unicodedata
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

from pydantic import Field, model_validator

from moesaic.core.config import Config
from moesaic.data.markup import without_placeholders
from moesaic.data.near import KeepNearDuplicates, NearDuplicates

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
