"""Gather: every unit of a corpus read and cleaned, by one process or several, with one result.

A unit is read into a folder of its own; the folders are joined in the order of the units, so what
comes out does not depend on how many processes read, nor on which of them was first.
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO, TypeVar

from moesaic.core.errors import DataError
from moesaic.corpus.cleaning import PairCleaner
from moesaic.corpus.corpus import text_file
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.languages import ENGLISH, resolve_language
from moesaic.corpus.pair import Pair, RejectedPair, Text
from moesaic.corpus.readers.tsv import escape_field
from moesaic.corpus.sources.text_source import LanguageFilter, SourceFile
from moesaic.corpus.spill import Direction, DropCounts, PairSpill
from moesaic.corpus.split import SplitConfig, split_key

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ReadJob:
    """A unit to read, its place among the others, and the folder to write to."""

    recipe: CorpusRecipe
    unit: SourceFile
    rank: int
    folder: Path

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs"

    @property
    def texts(self) -> Path:
        return self.folder / "texts"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"


@dataclass(slots=True)
class ReadResult:
    """What a unit held, counted; its rows are on disk."""

    counts: dict[Direction, DropCounts] = field(default_factory=lambda: defaultdict(DropCounts))
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    text_rows: Counter[str] = field(default_factory=Counter)

    def add(self, other: "ReadResult") -> None:
        """Count another unit's as well; an origin keeps the words of the unit read first."""
        for direction, tally in other.counts.items():
            self.counts[direction].read += tally.read
            self.counts[direction].dropped.update(tally.dropped)
        self.sources = other.sources | self.sources
        self.text_rows.update(other.text_rows)


def map_in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int
) -> Iterator[Result]:
    """Yield ``function(job)`` for each job, in their order, computed by ``workers`` processes.

    Raises what the function raises, and DataError when the system ends a process.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    # spawn: a fork would copy the threads' locks of whoever builds, torch's among them
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C ends them at once and without a traceback each
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads was ended by the system, perhaps for want of memory: build with "
            "fewer of them (`--workers 1`)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def read_source_file(job: ReadJob) -> ReadResult:
    """Read and clean one unit into its folder."""
    found = ReadResult()
    cleaner, wanted, split = (
        PairCleaner(job.recipe.clean),
        _language_filter(job.recipe),
        job.recipe.split,
    )
    spill, texts, keys = PairSpill(job.pairs), _TextWriter(job.texts, split), _SplitKeyWriter(split)
    try:
        for item in job.recipe.source.read(job.unit, wanted=wanted):
            if isinstance(item, RejectedPair):
                found.counts[item.direction].read += 1
                found.counts[item.direction].dropped[item.reason] += 1
                continue
            if item.origin not in found.sources:
                found.sources[item.origin] = {"version": job.unit.version, "licence": item.licence}
            if isinstance(item, Text):
                texts.add(item)
                continue
            tally = found.counts[item.direction]
            tally.read += 1
            pair, reason = cleaner.clean(item)
            if pair is None:
                tally.dropped[reason] += 1
                continue
            domain = split.domain_of(pair.origin)
            spill.add(pair, rank=job.rank, allowed_split=job.unit.allowed_split, domain=domain)
            keys.add(pair, allowed_split=job.unit.allowed_split, domain=domain)
    finally:
        spill.close()
        texts.close()
    found.text_rows = texts.rows
    keys.write(job.keys)
    return found


def english_side(pair: Pair) -> str:
    """Return the side whose hash decides the split: English where it is there, else the source."""
    return pair.target if pair.target_language == ENGLISH else pair.source


def _language_filter(recipe: CorpusRecipe) -> LanguageFilter:
    codes = {resolve_language(text).code for text in recipe.languages} | {ENGLISH}
    return (lambda code: code in codes) if recipe.languages else (lambda _: True)


class _SplitKeyWriter:
    """The split keys of a unit's sources, train and held out, each once; only if someone looks."""

    def __init__(self, split: SplitConfig) -> None:
        self._split, self._enabled = split, split.near_duplicates.enabled or bool(split.domains)
        self._sources: set[tuple[str, str]] = set()

    def add(self, pair: Pair, *, allowed_split: str, domain: str) -> None:
        if self._enabled:
            self._sources.add((english_side(pair), "held-out" if domain else allowed_split))

    def write(self, path: Path) -> None:
        """One key a line after ``t`` or ``h``, sorted."""
        lines = {
            f"{'t' if self._is_train(text, place) else 'h'}{split_key(text)}\n"
            for text, place in self._sources
        }
        path.write_text("".join(sorted(lines)), encoding="utf-8", newline="\n")

    def _is_train(self, text: str, place: str) -> bool:
        return place == "train" or (place == "any" and self._split.split_of(text) == "train")


class _TextWriter:
    """Writes monolingual texts, split like sources."""

    def __init__(self, folder: Path, split: SplitConfig) -> None:
        self._folder, self._split = folder, split
        self._streams: dict[str, TextIO] = {}
        self.rows: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, found: Text) -> None:
        text = " ".join(found.text.split())
        if not text:
            return
        domain = self._split.domain_of(found.origin)
        name = text_file(found.language, domain or self._split.split_of(text))
        if name not in self._streams:
            self._streams[name] = (self._folder / name).open("w", encoding="utf-8", newline="\n")
        self._streams[name].write(escape_field(text) + "\n")
        self.rows[name] += 1

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
