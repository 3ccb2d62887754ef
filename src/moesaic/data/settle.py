"""Settle: one direction's rows brought down to one target per source, split, and written."""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.files import sha256
from moesaic.data.corpus import pair_file
from moesaic.data.leaks import Leaks
from moesaic.data.readers.tsv import escape
from moesaic.data.spill import Bin, Candidate, Direction, Spill, Tally
from moesaic.data.split import SPLITS, Split, digest64, split_key

ENGLISH = "eng_Latn"
_SIZE = ("pairs", "source_characters", "target_characters", "source_words", "target_words")


@dataclass(frozen=True, slots=True)
class Settling:
    """A direction to write: from where, to where, and what the whole corpus has found out."""

    direction: Direction
    spill: Path
    work: Path
    split: Split
    leaks: Leaks
    tally: Tally
    min_pairs: int


@dataclass(frozen=True, slots=True)
class Settled:
    """A direction written: ``splits`` are counts by split, ``files`` what corpus.json says of each.

    It has no files when fewer than ``min_pairs`` pairs were left outside of the domains.
    """

    direction: Direction
    pairs: int
    splits: dict[str, dict[str, int]]
    tally: Tally
    origins: Counter[str]
    files: dict[str, dict[str, Any]]

    @property
    def about(self) -> dict[str, Any]:
        """What corpus.json says of the direction."""
        return {
            "source": self.direction[0],
            "target": self.direction[1],
            "read": self.tally.read,
            "dropped": dict(sorted((k, v) for k, v in self.tally.dropped.items() if v)),
            "splits": self.splits,
        }


def settle(job: Settling) -> Settled:
    """Write the files of a direction."""
    spill, writer = Spill(job.spill), _Writer(job)
    for domain in ("", *(domain.name for domain in job.split.domains)):
        for candidate in spill.chosen(Bin(job.direction, domain), tally=job.tally):
            writer.add(candidate, domain=domain)
    splits = writer.close()
    pairs = sum(splits[name]["pairs"] for name in SPLITS)
    files = {} if pairs < job.min_pairs else _files(job, splits)
    for name in splits:
        path = pair_file(*job.direction, name)
        if path not in files:
            (job.work / path).unlink()
    return Settled(job.direction, pairs, splits, job.tally, writer.origins, files)


def _files(job: Settling, splits: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    found = {}
    for split, counts in splits.items():
        if counts["pairs"]:
            name = pair_file(*job.direction, split)
            path = job.work / name
            found[name] = {
                "rows": counts["pairs"],
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
    return found


class _Writer:
    """Writes one direction's splits; held-out rows wait until all train targets are known."""

    def __init__(self, job: Settling) -> None:
        self._names = (*SPLITS, *(domain.name for domain in job.split.domains))
        self._paths = {s: job.work / pair_file(*job.direction, s) for s in self._names}
        self._train = self._paths["train"].open("w", encoding="utf-8", newline="\n")
        self._held = job.work / f"held-{'-'.join(job.direction)}"
        self._waiting = self._held.open("w", encoding="utf-8", newline="\n")
        self._split, self._tally, self._leaks = job.split, job.tally, job.leaks
        self._english = 1 if job.direction[1] == ENGLISH else 0
        self._sources, self._targets = array("Q"), array("Q")
        self._counts = {s: [0] * len(_SIZE) for s in self._names}
        self.origins: Counter[str] = Counter()

    def add(self, row: Candidate, *, domain: str = "") -> None:
        # English decides when it is there, so both directions of a pair fall into one split
        text = row.target if self._english else row.source
        split = domain or (self._split.of(text) if row.place == "any" else row.place)
        if split == "held-out":
            split = self._split.held_out(text)
        line = f"{escape(row.source)}\t{escape(row.target)}\t{escape(row.origin)}\n"
        if split == "train":
            self._train.write(line)
            self._targets.append(digest64(split_key(row.target)))
            if row.place != "any":
                self._sources.append(digest64(split_key(row.source)))
            self._count(row.source, row.target, split=split, origin=row.origin)
            return
        seen = digest64(split_key(text))
        if seen in self._leaks.exact or seen in self._leaks.near:
            reason = "source_in_train" if seen in self._leaks.exact else "near_train"
            self._tally.dropped[reason] += 1
            return
        marks = f"{digest64(split_key(row.source))}\t{digest64(split_key(row.target))}"
        self._waiting.write(f"{split}\t{marks}\t{line}")

    def _count(self, source: str, target: str, *, split: str, origin: str) -> None:
        counts = self._counts[split]
        counts[0] += 1
        counts[1] += len(source)
        counts[2] += len(target)
        counts[3] += len(source.split())
        counts[4] += len(target.split())
        self.origins[origin] += 1

    def close(self) -> dict[str, dict[str, int]]:
        """Write the held-out rows that leak nothing; return counts per split."""
        self._train.close()
        self._waiting.close()
        streams = {
            s: self._paths[s].open("w", encoding="utf-8", newline="\n") for s in self._names[1:]
        }
        sources, targets = (
            np.unique(np.array(a, np.uint64)) for a in (self._sources, self._targets)
        )
        for split, marks, fields in self._held_out():
            if _has(sources, marks[0]):
                self._tally.dropped["source_in_train"] += 1
            elif _has(targets, marks[1]):
                self._tally.dropped["target_in_train"] += 1
            else:
                streams[split].write("\t".join(fields))
                origin = fields[2].rstrip("\n")
                self._count(fields[0], fields[1], split=split, origin=origin)
        for stream in streams.values():
            stream.close()
        self._held.unlink()
        return {s: dict(zip(_SIZE, self._counts[s], strict=True)) for s in self._names}

    def _held_out(self) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
        with self._held.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                split, source, target, *fields = line.split("\t")
                yield split, (int(source), int(target)), fields


def _has(marks: np.ndarray, mark: int) -> bool:
    place = int(np.searchsorted(marks, np.uint64(mark)))
    return place < len(marks) and int(marks[place]) == mark
