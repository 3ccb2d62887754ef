"""Settle: one direction's rows brought down to one target per source, split, and written."""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.files import sha256
from moesaic.corpus.corpus import pair_file
from moesaic.corpus.languages import ENGLISH
from moesaic.corpus.readers.tsv import escape_field
from moesaic.corpus.spill import Direction, DropCounts, PairSpill, SpillBin, TargetCandidate
from moesaic.corpus.split import SPLITS, LeakedSources, SplitConfig, digest64, split_key

_COUNT_NAMES = ("pairs", "source_characters", "target_characters", "source_words", "target_words")


@dataclass(frozen=True, slots=True)
class DirectionJob:
    """A direction to write: from where, to where, and what the whole corpus has found out."""

    direction: Direction
    spill: Path
    work: Path
    split: SplitConfig
    leaks: LeakedSources
    counts: DropCounts
    min_pairs: int


@dataclass(frozen=True, slots=True)
class DirectionResult:
    """A direction written: ``splits`` are counts by split, ``files`` what corpus.json says of each.

    It has no files when fewer than ``min_pairs`` pairs were left outside of the domains.
    """

    direction: Direction
    pairs: int
    splits: dict[str, dict[str, int]]
    counts: DropCounts
    origins: Counter[str]
    files: dict[str, dict[str, Any]]

    @property
    def manifest_entry(self) -> dict[str, Any]:
        """What corpus.json says of the direction."""
        return {
            "source": self.direction[0],
            "target": self.direction[1],
            "read": self.counts.read,
            "dropped": dict(sorted((k, v) for k, v in self.counts.dropped.items() if v)),
            "splits": self.splits,
        }


def resolve_conflicts(job: DirectionJob) -> DirectionResult:
    """Write the files of a direction."""
    spill, writer = PairSpill(job.spill), _DirectionWriter(job)
    for domain in ("", *(domain.name for domain in job.split.domains)):
        for candidate in spill.majority_targets(SpillBin(job.direction, domain), counts=job.counts):
            writer.add(candidate, domain=domain)
    splits = writer.close()
    pairs = sum(splits[name]["pairs"] for name in SPLITS)
    files = {} if pairs < job.min_pairs else _file_manifest(job, splits)
    for name in splits:
        path = pair_file(*job.direction, name)
        if path not in files:
            (job.work / path).unlink()
    return DirectionResult(job.direction, pairs, splits, job.counts, writer.origins, files)


def _file_manifest(
    job: DirectionJob, splits: dict[str, dict[str, int]]
) -> dict[str, dict[str, Any]]:
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


class _DirectionWriter:
    """Writes one direction's splits; held-out rows wait until all train targets are known."""

    def __init__(self, job: DirectionJob) -> None:
        self._names = (*SPLITS, *(domain.name for domain in job.split.domains))
        self._paths = {s: job.work / pair_file(*job.direction, s) for s in self._names}
        self._train = self._paths["train"].open("w", encoding="utf-8", newline="\n")
        self._held = job.work / f"held-{'-'.join(job.direction)}"
        self._waiting = self._held.open("w", encoding="utf-8", newline="\n")
        self._split, self._tally, self._leaks = job.split, job.counts, job.leaks
        self._english = 1 if job.direction[1] == ENGLISH else 0
        self._sources, self._targets = array("Q"), array("Q")
        self._counts = {s: [0] * len(_COUNT_NAMES) for s in self._names}
        self.origins: Counter[str] = Counter()

    def add(self, row: TargetCandidate, *, domain: str = "") -> None:
        # English decides when it is there, so both directions of a pair fall into one split
        text = row.target if self._english else row.source
        split = domain or (
            self._split.split_of(text) if row.allowed_split == "any" else row.allowed_split
        )
        if split == "held-out":
            split = self._split.held_out_split_of(text)
        line = (
            f"{escape_field(row.source)}\t{escape_field(row.target)}\t{escape_field(row.origin)}\n"
        )
        if split == "train":
            self._train.write(line)
            self._targets.append(digest64(split_key(row.target)))
            if row.allowed_split != "any":
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
            if _contains_sorted(sources, marks[0]):
                self._tally.dropped["source_in_train"] += 1
            elif _contains_sorted(targets, marks[1]):
                self._tally.dropped["target_in_train"] += 1
            else:
                streams[split].write("\t".join(fields))
                origin = fields[2].rstrip("\n")
                self._count(fields[0], fields[1], split=split, origin=origin)
        for stream in streams.values():
            stream.close()
        self._held.unlink()
        return {s: dict(zip(_COUNT_NAMES, self._counts[s], strict=True)) for s in self._names}

    def _held_out(self) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
        with self._held.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                split, source, target, *fields = line.split("\t")
                yield split, (int(source), int(target)), fields


def _contains_sorted(marks: np.ndarray, mark: int) -> bool:
    place = int(np.searchsorted(marks, np.uint64(mark)))
    return place < len(marks) and int(marks[place]) == mark
