"""Spill: cleaned pairs on their way into a corpus, one temporary file per direction and domain.

Memory stays flat: a direction that outgrows ``BUCKET_BYTES`` is cut into buckets by its source's
hash, and one bucket at a time is brought down to one target per source.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from moesaic.corpus.pair import Pair
from moesaic.corpus.readers.tsv import escape_field, unescape_field
from moesaic.corpus.split import digest64

BUCKET_BYTES = 96 * 2**20
Direction = tuple[str, str]


@dataclass(slots=True)
class DropCounts:
    """What happened to the rows of a direction: how many were read, how many fell to which rule."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class TargetCandidate:
    """A source, a target it was given, by whom (rank: when that unit is read), and where to."""

    source: str
    target: str
    rank: int
    origin: str
    allowed_split: str


@dataclass(slots=True)
class _Votes:
    """How often a target was given, and its first giver."""

    count: int
    first: TargetCandidate


@dataclass(frozen=True, slots=True, order=True)
class SpillBin:
    """What is brought down to one target per source together: a direction, whole or in a domain."""

    direction: Direction
    domain: str = ""

    @property
    def file(self) -> str:
        return "-".join(self.direction) + (f"@{self.domain}" if self.domain else "")

    @classmethod
    def from_file_name(cls, file: str) -> "SpillBin":
        """Read a bin back from its file's name."""
        both, _, domain = file.partition("@")
        source, target = both.split("-")
        return cls((source, target), domain)


class PairSpill:
    """A folder of rows by bin: takes pairs, gives them back bin by bin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[SpillBin, TextIO] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, pair: Pair, *, rank: int, allowed_split: str, domain: str = "") -> None:
        """Write a pair down. Several processes may not write to one folder: see ``take``."""
        which = SpillBin(pair.direction, domain)
        stream = self._files.get(which)
        if stream is None:
            stream = (self._folder / which.file).open("w", encoding="utf-8", newline="\n")
            self._files[which] = stream
        stream.write(
            f"{escape_field(pair.source)}\t{escape_field(pair.target)}\t{rank}\t{escape_field(pair.origin)}\t{allowed_split}\n"
        )

    def close(self) -> None:
        for stream in self._files.values():
            stream.close()

    def append_from(self, folder: Path) -> None:
        """Append the rows of another, closed spill's folder to this one's, and remove them."""
        for path in sorted(folder.iterdir()):
            with (self._folder / path.name).open("ab") as whole, path.open("rb") as part:
                shutil.copyfileobj(part, whole)
            path.unlink()

    def bins(self) -> list[SpillBin]:
        """Return every bin that holds rows, sorted, whoever wrote it."""
        return sorted(SpillBin.from_file_name(path.name) for path in self._folder.iterdir())

    def majority_targets(self, which: SpillBin, *, counts: DropCounts) -> Iterator[TargetCandidate]:
        """Yield one target per source of a bin, by majority, in the order first seen."""
        path = self._folder / which.file
        for bucket in self._buckets(path) if path.is_file() else ():
            yield from _majority_vote(_read_candidates(bucket), counts=counts)
            bucket.unlink()

    def _buckets(self, path: Path) -> list[Path]:
        number = path.stat().st_size // BUCKET_BYTES + 1
        if number == 1:
            return [path]
        paths = [path.with_name(f"{path.name}.{i}") for i in range(number)]
        streams = [p.open("w", encoding="utf-8", newline="\n") for p in paths]
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                streams[digest64(line.partition("\t")[0]) % number].write(line)
        for stream in streams:
            stream.close()
        path.unlink()
        return paths


def _read_candidates(path: Path) -> Iterator[TargetCandidate]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            source, target, rank, origin, place = line.rstrip("\n").split("\t")
            yield TargetCandidate(
                unescape_field(source),
                unescape_field(target),
                int(rank),
                unescape_field(origin),
                place,
            )


def _majority_vote(
    candidates: Iterator[TargetCandidate], *, counts: DropCounts
) -> Iterator[TargetCandidate]:
    votes: dict[str, dict[str, _Votes]] = {}
    for found in candidates:
        targets = votes.setdefault(found.source, {})
        held = targets.get(found.target)
        if held is None:
            targets[found.target] = _Votes(1, found)
        else:
            held.count += 1
            counts.dropped["duplicate"] += 1
    for targets in votes.values():
        best = min(targets.values(), key=_vote_order)
        counts.dropped["other_target"] += len(targets) - 1
        yield best.first


def _vote_order(votes: _Votes) -> tuple[int, int, str]:
    """Most votes; then the unit read first; then the smaller text: no order of files decides."""
    return -votes.count, votes.first.rank, votes.first.target
