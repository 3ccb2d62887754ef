"""Token shards: a corpus as token ids in three memory-mapped files.

``tokens.bin`` has all texts end to end, ``offsets.bin`` the start of each (uint64, one more than
texts), ``pairs.bin`` two text ids per pair (uint32). A text is stored once for all pairs that share
it; ``shards.json`` has the ranges of texts by language, of documents by language and domain, and of
pairs by direction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from moesaic.core.errors import DataError, did_you_mean, listed
from moesaic.core.files import sha256
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.shards_manifest import (
    DATA_FILES,
    OFFSET_TYPE,
    PAIR_TYPE,
    SHARDS_FILE,
    map_array,
    read_shards_manifest,
)


@dataclass(frozen=True, slots=True)
class PairRows:
    """Rows of ``pairs[N, 2]``; ``source_column`` is the column of the source."""

    pairs: IntArray
    source_column: int
    num_tokens: int

    @property
    def size(self) -> int:
        return self.pairs.shape[0]

    def text_ids(self, index: IntArray) -> tuple[IntArray, IntArray]:
        found = self.pairs[index].astype(np.int64)
        return found[:, self.source_column], found[:, 1 - self.source_column]


@dataclass(frozen=True, slots=True)
class TextRows:
    """Texts ``start`` to ``start + size``, each its own source and target."""

    start: int
    size: int
    num_tokens: int

    def text_ids(self, index: IntArray) -> tuple[IntArray, IntArray]:
        found = index + self.start
        return found, found


IndexedRows: TypeAlias = PairRows | TextRows


class TokenShards:
    """A read-only view of a shard directory. Memory use does not depend on the corpus size."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._tokens = map_array(path / "tokens.bin", np.dtype(manifest["token_type"]))
        self._offsets = map_array(path / "offsets.bin", OFFSET_TYPE)
        self._pairs = map_array(path / "pairs.bin", PAIR_TYPE).reshape(-1, 2)

    @classmethod
    def open(cls, path: Path | str) -> "TokenShards":
        """Check and map the files. Raises DataError naming one that is missing or does not fit."""
        path = Path(path)
        return cls(path, read_shards_manifest(path).model_dump())

    def verify(self) -> None:
        """Read every file and compare its hash. Raises DataError naming an altered file."""
        for name in DATA_FILES:
            if sha256(self.path / name) != self.manifest["files"][name]["sha256"]:
                raise DataError(
                    f"{self.path / name}: altered since it was written; delete {self.path}"
                )

    @property
    def fingerprint(self) -> str:
        """A hash of the corpus and the tokenizer of these shards."""
        return self.manifest["fingerprint"]

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest["tokenizer"]

    @property
    def languages(self) -> tuple[str, ...]:
        names = (name for name, _ in _split_names(self.manifest["texts"]))
        return tuple(sorted({name.partition("@")[0] for name in names}))

    def domains(self, language: str, *, split: str = "train") -> tuple[str, ...]:
        """The domains of a language's texts, sorted; empty for texts without one."""
        names = (name for name, found in _split_names(self.manifest["texts"]) if found == split)
        parts = (name.partition("@") for name in names)
        return tuple(sorted({domain for code, _, domain in parts if code == language}))

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """(source, target) codes as in the corpus; each can be read in reverse as well."""
        found = {name for name, _ in _split_names(self.manifest["pairs"])}
        return tuple(sorted((s, t) for s, _, t in (name.partition("-") for name in found)))

    def pair_rows(self, source: str, target: str, *, split: str = "train") -> PairRows:
        """Return the pairs of a direction, which may be the reverse of one in the corpus."""
        for name, column in ((f"{source}-{target}", 0), (f"{target}-{source}", 1)):
            entry = self.manifest["pairs"].get(f"{name}.{split}")
            if entry:
                part = self._pairs[entry["start"] : entry["start"] + entry["count"]]
                side = "target_tokens" if column == 0 else "source_tokens"
                return PairRows(part, column, entry[side])
        known = [f"{s}-{t}" for s, t in self.directions]
        if (source, target) not in self.directions and (target, source) not in self.directions:
            raise DataError(
                f"no pairs {source}-{target} in these shards; they have {listed(known)}"
                f"{did_you_mean(f'{source}-{target}', known)}"
            )
        return PairRows(self._pairs[:0], 0, 0)

    def text_rows(self, language: str, *, split: str = "train", domain: str = "") -> TextRows:
        """Return the distinct texts of a language: of all pairs, and monolingual.

        Documents with a domain are apart, each text in one domain.
        """
        if language not in self.languages:
            raise DataError(
                f'no text in "{language}" in these shards; they have {", ".join(self.languages)}'
                f"{did_you_mean(language, self.languages)}"
            )
        entry = self.manifest["texts"].get(text_key(language, split=split, domain=domain))
        return (
            TextRows(entry["start"], entry["count"], entry["tokens"])
            if entry
            else TextRows(0, 0, 0)
        )

    def pivot_rows(self, source: str, target: str, *, pivot: str, split: str) -> PairRows:
        """Return pairs of two languages that share a text of ``pivot``.

        They are kept in memory, 8 bytes each. Of several translations of a text, the first is used.
        """
        left = self.pair_rows(pivot, source, split=split)
        right = self.pair_rows(pivot, target, split=split)
        ends = [rows.text_ids(np.arange(rows.size)) for rows in (left, right)]
        _, at_left, at_right = np.intersect1d(ends[0][0], ends[1][0], return_indices=True)
        pairs = np.stack([ends[0][1][at_left], ends[1][1][at_right]], axis=1).astype(np.uint32)
        mean = right.num_tokens / max(1, right.size)
        return PairRows(pairs, 0, round(mean * pairs.shape[0]))

    def lengths(self, texts: IntArray) -> IntArray:
        """Return the token counts of texts (special tokens are not stored)."""
        return (self._offsets[texts + 1] - self._offsets[texts]).astype(np.int64)

    def gather(self, texts: IntArray) -> Ragged:
        """Return the tokens of texts, given their ids."""
        return self.gather_parts(texts, first=np.zeros_like(texts), lengths=self.lengths(texts))

    def gather_parts(self, texts: IntArray, *, first: IntArray, lengths: IntArray) -> Ragged:
        """Return ``lengths`` tokens of each text from its token ``first`` on."""
        starts = self._offsets[texts].astype(np.int64) + first
        found = Ragged.gather(self._tokens, starts=starts, lengths=lengths)
        if found.tokens.size and found.tokens.max() >= self.manifest["vocab_size"]:
            raise SHARDS_FILE.problem(
                self.path / "tokens.bin",
                f"a token of {found.tokens.max()} is not in the vocabulary",
            )
        return found


def text_key(language: str, *, split: str, domain: str = "") -> str:
    """Return the key of a range of texts in shards.json."""
    return f"{language}@{domain}.{split}" if domain else f"{language}.{split}"


def _split_names(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in table:
        name, _, split = key.rpartition(".")
        yield name, split
