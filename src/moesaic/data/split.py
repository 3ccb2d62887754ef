"""Split: train, valid or test, decided by a hash of the normalised source alone.

So the split is the same in every language, whatever else the corpus holds, and two sources that
differ only in case, punctuation, digits or placeholders never stand on two sides of it.
"""

import unicodedata
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

from pydantic import Field, model_validator

from moesaic.core.config import Config
from moesaic.data.markup import without_placeholders

SPLITS = ("train", "valid", "test")
SplitName = Literal["train", "valid", "test"]


class _Letters(dict[int, str]):
    """Letters and their marks as they are, all else a space."""

    def __missing__(self, point: int) -> str:
        char = chr(point)
        self[point] = char if unicodedata.category(char)[0] in "LM" else " "
        return self[point]


_LETTERS = _Letters()


class Split(Config):
    """Shares of 1 that go to test and valid; ``salt`` draws another split."""

    test: float = Field(default=0.10, ge=0, lt=1)
    valid: float = Field(default=0.05, ge=0, lt=1)
    salt: str = ""

    @model_validator(mode="after")
    def _leaves_something(self) -> "Split":
        if self.test + self.valid >= 1:
            raise ValueError(f"test={self.test} and valid={self.valid} leave nothing to train on")
        return self

    def of(self, source: str) -> SplitName:
        """Return the split of a source text."""
        place = self._place(source)
        if place < self.test:
            return "test"
        return "valid" if place < self.test + self.valid else "train"

    def held_out(self, source: str) -> SplitName:
        """Return valid or test, in the proportion of their shares, for a row that is not train."""
        share = self.test / (self.test + self.valid) if self.test + self.valid else 0.5
        return "test" if self._place(source) < share else "valid"

    def _place(self, source: str) -> float:
        return _place(source, self.salt)


@lru_cache(maxsize=1 << 16)  # a source recurs in every language
def _place(source: str, salt: str) -> float:
    return digest64(f"{salt}\0{split_key(source)}") / 2**64


def split_key(text: str) -> str:
    """Return what is left when case, punctuation, digits and placeholders are ignored."""
    plain = unicodedata.normalize("NFKC", without_placeholders(text)).casefold()
    return " ".join(plain.translate(_LETTERS).split()) or text.casefold()


def digest64(text: str) -> int:
    """Return a 64-bit hash that is the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
