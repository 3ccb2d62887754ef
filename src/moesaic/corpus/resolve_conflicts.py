"""Conflict resolution: one target per source of a direction, then the files of its splits."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.corpus.corpus import file_entry, pair_file
from moesaic.corpus.dropped_rows import DroppedRow, DroppedRows
from moesaic.corpus.languages import ENGLISH
from moesaic.corpus.readers.text_lines import read_lines
from moesaic.corpus.readers.tsv import escape_field, read_rows, unescape_field
from moesaic.corpus.spill import (
    Direction,
    DropCounts,
    DroppedCandidate,
    PairSpill,
    SpillBin,
    TargetCandidate,
)
from moesaic.corpus.split import SPLITS, LeakedSources, SplitConfig, digest64, split_key

_COUNT_NAMES = ("pairs", "source_characters", "target_characters", "source_words", "target_words")


@dataclass(frozen=True, slots=True)
class DirectionJob:
    """A direction to write: its spilled rows, the output folder, and its corpus's settings."""

    direction: Direction
    spill: Path
    work: Path
    split: SplitConfig
    leaks: LeakedSources
    counts: DropCounts
    min_pairs: int


@dataclass(frozen=True, slots=True)
class DirectionResult:
    """A direction written: ``splits`` are counts by split, ``files`` the manifest's entries.

    It has no files when fewer than ``min_pairs`` pairs remain outside of the domains.
    """

    direction: Direction
    pairs: int
    splits: dict[str, dict[str, int]]
    counts: DropCounts
    origins: Counter[str]
    files: dict[str, dict[str, Any]]
    dropped: DroppedRows

    @property
    def manifest_entry(self) -> dict[str, Any]:
        """The direction's entry in corpus.json."""
        return {
            "source": self.direction[0],
            "target": self.direction[1],
            "read": self.counts.read,
            "dropped": self.counts.by_reason,
            "splits": self.splits,
        }


def resolve_conflicts(job: DirectionJob) -> DirectionResult:
    """Choose one target per source of a direction, and write its splits."""
    spill, writer = PairSpill(job.spill), _DirectionWriter(job)
    for domain in ("", *(domain.name for domain in job.split.domains)):
        which = SpillBin(job.direction, domain)
        for candidate in spill.majority_targets(which, drop=writer.drop):
            writer.add(candidate, domain=domain)
    splits = writer.close()
    pairs = sum(splits[name]["pairs"] for name in SPLITS)
    files = {}
    for split, counts in splits.items():
        name = pair_file(*job.direction, split)
        if counts["pairs"] and pairs >= job.min_pairs:
            files[name] = file_entry(job.work / name, rows=counts["pairs"])
        else:
            (job.work / name).unlink()
    return DirectionResult(
        job.direction, pairs, splits, job.counts, writer.origins, files, writer.dropped
    )


class _DirectionWriter:
    """Writes a direction's splits; held-out rows go to a temporary file until train is complete."""

    def __init__(self, job: DirectionJob) -> None:
        self._names = (*SPLITS, *(domain.name for domain in job.split.domains))
        self._paths = {s: job.work / pair_file(*job.direction, s) for s in self._names}
        self._train = self._paths["train"].open("w", encoding="utf-8", newline="\n")
        self._held_out_path = job.work / f"held-{'-'.join(job.direction)}"
        self._held_out_rows = self._held_out_path.open("w", encoding="utf-8", newline="\n")
        self._split, self._drops, self._leaks = job.split, job.counts, job.leaks
        self._direction, self.dropped = "-".join(job.direction), DroppedRows()
        self._english = 1 if job.direction[1] == ENGLISH else 0
        self._sources, self._targets = array("Q"), array("Q")
        self._counts = {s: [0] * len(_COUNT_NAMES) for s in self._names}
        self.origins: Counter[str] = Counter()

    def drop(self, what: DroppedCandidate) -> None:
        """Count a row that is not kept, and keep it to be looked at."""
        self._drops.dropped[what.reason] += 1
        row = what.candidate
        self.dropped.add(
            DroppedRow(self._direction, what.reason, row.source, row.target, row.origin, what.kept)
        )

    def add(self, row: TargetCandidate, *, domain: str = "") -> None:
        """Write a row to the split of its source."""
        # English decides if it is one side, so that both directions of a pair are in one split
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
            # the hash of an English target does not keep equal sources together
            if row.allowed_split != "any" or self._english:
                self._sources.append(digest64(split_key(row.source)))
            self._count(row.source, row.target, split=split, origin=row.origin)
            return
        digest = digest64(split_key(text))
        if digest in self._leaks.exact or digest in self._leaks.near:
            reason = "source_in_train" if digest in self._leaks.exact else "near_train"
            self.drop(DroppedCandidate(row, reason, ""))
            return
        digests = f"{digest64(split_key(row.source))}\t{digest64(split_key(row.target))}"
        self._held_out_rows.write(f"{split}\t{digests}\t{line}")

    def _count(self, source: str, target: str, *, split: str, origin: str) -> None:
        sizes = (1, len(source), len(target), len(source.split()), len(target.split()))
        self._counts[split] = [a + b for a, b in zip(self._counts[split], sizes, strict=True)]
        self.origins[origin] += 1

    def close(self) -> dict[str, dict[str, int]]:
        """Write the held-out rows that are not in train; return counts per split."""
        self._train.close()
        self._held_out_rows.close()
        streams = {
            s: self._paths[s].open("w", encoding="utf-8", newline="\n") for s in self._names[1:]
        }
        sources, targets = (
            np.unique(np.array(a, np.uint64)) for a in (self._sources, self._targets)
        )
        for split, digests, fields in self._read_held_out():
            row = [unescape_field(text.rstrip("\n")) for text in fields]
            reason = "source_in_train" if _contains_sorted(sources, digests[0]) else ""
            if not reason and _contains_sorted(targets, digests[1]):
                reason = "target_in_train"
            if reason:
                self.drop(
                    DroppedCandidate(TargetCandidate(row[0], row[1], 0, row[2], ""), reason, "")
                )
                continue
            streams[split].write("\t".join(fields))
            self._count(row[0], row[1], split=split, origin=row[2])
        for stream in streams.values():
            stream.close()
        self._held_out_path.unlink()
        return {s: dict(zip(_COUNT_NAMES, self._counts[s], strict=True)) for s in self._names}

    def _read_held_out(self) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
        with self._held_out_path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                split, source, target, *fields = line.split("\t")
                yield split, (int(source), int(target)), fields


def _contains_sorted(digests: np.ndarray, digest: int) -> bool:
    index = int(np.searchsorted(digests, np.uint64(digest)))
    return index < len(digests) and int(digests[index]) == digest


def remove_held_out(path: Path, *, pairs: Iterable[Path], code: str) -> list[str]:
    """Remove a file's texts that are a side of one of the held-out ``pairs``, and return them.

    A text and a pair are split by different hashes where the text is not English: a model would
    learn to write the references of its test set. Memory: 8 bytes per held-out pair.
    """
    digests = array("Q")
    for file in pairs:
        side = file.name.partition(".")[0].split("-").index(code)
        digests.extend(
            digest64(split_key(unescape_field(row.fields[side])))
            for row in read_rows(file, columns=3)
        )
    held_out, removed = np.unique(np.array(digests, np.uint64)), []
    if not len(held_out):
        return removed
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="\n") as stream:
        for _, line in read_lines(path):
            text = unescape_field(line.partition("\t")[0])
            if _contains_sorted(held_out, digest64(split_key(text))):
                removed.append(text)
            else:
                stream.write(line + "\n")
    part.replace(path)
    return removed
