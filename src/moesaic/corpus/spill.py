"""Spill files: cleaned pairs on disk, one temporary file per direction and held-out domain.

Memory is bounded: a file larger than ``BUCKET_BYTES`` is divided into buckets by a hash of the
source, and conflicts are resolved one bucket at a time (one target per source, by majority vote).
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moesaic.corpus.append_files import AppendFiles
from moesaic.corpus.pair import Pair
from moesaic.corpus.readers.tsv import escape_field, unescape_field
from moesaic.corpus.split import digest64

BUCKET_BYTES = 96 * 2**20
Direction = tuple[str, str]


@dataclass(slots=True)
class DropCounts:
    """Rows of a direction: how many were read, and how many were dropped, by reason."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: "DropCounts") -> None:
        """Add the counts of other rows."""
        self.read += other.read
        self.dropped.update(other.dropped)

    @property
    def by_reason(self) -> dict[str, int]:
        """Reasons with their rows, sorted by name; none without a row."""
        return dict(sorted((reason, n) for reason, n in self.dropped.items() if n))


@dataclass(frozen=True, slots=True)
class TargetCandidate:
    """A source and one of its targets; ``rank`` is the position of its file among those read."""

    source: str
    target: str
    rank: int
    origin: str
    allowed_split: str


@dataclass(frozen=True, slots=True)
class DroppedCandidate:
    """A candidate that is not kept, and the target that is kept for its source."""

    candidate: TargetCandidate
    reason: str
    kept: str


@dataclass(slots=True)
class _Votes:
    """The number of times that a target occurs, and its first occurrence."""

    count: int
    first: TargetCandidate


@dataclass(frozen=True, slots=True, order=True)
class SpillBin:
    """Rows whose conflicts are resolved together: a direction, outside of or in a domain."""

    direction: Direction
    domain: str = ""

    @property
    def file(self) -> str:
        return "-".join(self.direction) + (f"@{self.domain}" if self.domain else "")

    @classmethod
    def from_file_name(cls, file: str) -> "SpillBin":
        """Parse the name of a bin's file."""
        both, _, domain = file.partition("@")
        source, target = both.split("-")
        return cls((source, target), domain)


class PairSpill:
    """A folder with a file of rows for each bin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = AppendFiles()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, pair: Pair, *, rank: int, allowed_split: str, domain: str = "") -> None:
        """Write a pair. Processes need a folder each: see ``append_from``."""
        self._files.write(
            self._folder / SpillBin(pair.direction, domain).file,
            f"{escape_field(pair.source)}\t{escape_field(pair.target)}\t{rank}\t"
            f"{escape_field(pair.origin)}\t{allowed_split}\n",
        )

    def close(self) -> None:
        self._files.close()

    def append_from(self, folder: Path) -> None:
        """Move the rows of another, closed spill's folder to the end of this one's."""
        for path in sorted(folder.iterdir()):
            with (self._folder / path.name).open("ab") as merged, path.open("rb") as part:
                shutil.copyfileobj(part, merged)
            path.unlink()

    def bins(self) -> list[SpillBin]:
        """Return every bin with rows, sorted."""
        return sorted(SpillBin.from_file_name(path.name) for path in self._folder.iterdir())

    def majority_targets(
        self, which: SpillBin, *, drop: Callable[[DroppedCandidate], None]
    ) -> Iterator[TargetCandidate]:
        """Yield one target per source of a bin, by majority vote, in order of first occurrence.

        ``drop`` is called with every other candidate.
        """
        path = self._folder / which.file
        for bucket in self._buckets(path) if path.is_file() else ():
            yield from _majority_vote(_read_candidates(bucket), drop=drop)
            bucket.unlink()

    def _buckets(self, path: Path) -> list[Path]:
        number = path.stat().st_size // BUCKET_BYTES + 1
        if number == 1:
            return [path]
        paths = [path.with_name(f"{path.name}.{i}") for i in range(number)]
        buckets = AppendFiles()
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                buckets.write(paths[digest64(line.partition("\t")[0]) % number], line)
        buckets.close()
        for empty in paths:
            empty.touch()
        path.unlink()
        return paths


def _read_candidates(path: Path) -> Iterator[TargetCandidate]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            source, target, rank, origin, allowed = line.rstrip("\n").split("\t")
            yield TargetCandidate(
                unescape_field(source),
                unescape_field(target),
                int(rank),
                unescape_field(origin),
                allowed,
            )


def _majority_vote(
    candidates: Iterator[TargetCandidate], *, drop: Callable[[DroppedCandidate], None]
) -> Iterator[TargetCandidate]:
    votes: dict[str, dict[str, _Votes]] = {}
    for found in candidates:
        targets = votes.setdefault(found.source, {})
        known = targets.get(found.target)
        if known is None:
            targets[found.target] = _Votes(1, found)
        else:
            known.count += 1
            drop(DroppedCandidate(found, "duplicate", found.target))
    for targets in votes.values():
        best = min(targets.values(), key=_vote_order).first
        for other in targets.values():
            if other.first is not best:
                drop(DroppedCandidate(other.first, "other_target", best.target))
        yield best


def _vote_order(votes: _Votes) -> tuple[int, int, str]:
    """Most votes, then the file read first, then the smaller text: independent of line order."""
    return -votes.count, votes.first.rank, votes.first.target
