"""Reading sources: every source file read and cleaned, by one process or several, with one result.

Each source file is read into a folder of its own; the folders are joined in the order of the files,
so that the result depends neither on the number of processes nor on their timing.
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from moesaic.core.errors import DataError
from moesaic.corpus.append_files import AppendFiles
from moesaic.corpus.cleaning import PairCleaner
from moesaic.corpus.corpus import text_file
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.dropped_rows import DroppedRow, DroppedRows
from moesaic.corpus.languages import ENGLISH, resolve_language
from moesaic.corpus.pair import Pair, RejectedPair, Text
from moesaic.corpus.readers.text_lines import EmptyFileError
from moesaic.corpus.readers.tsv import escape_field
from moesaic.corpus.sources.text_source import LanguageFilter, SourceFile
from moesaic.corpus.spill import Direction, DropCounts, PairSpill
from moesaic.corpus.split import SplitConfig, split_key

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ReadJob:
    """A source file to read, its rank among the others, and the folder to write to."""

    recipe: CorpusRecipe
    source_file: SourceFile
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
class SourceInfo:
    """Versions and licences of the files of one origin, in the order of reading; rows of text."""

    versions: list[str] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)
    texts: int = 0

    def add(self, other: "SourceInfo") -> None:
        """Add what another file says of this origin."""
        self.versions = list(dict.fromkeys((*self.versions, *other.versions)))
        self.licences = list(dict.fromkeys((*self.licences, *other.licences)))
        self.texts += other.texts

    def manifest_entry(self, *, pairs: int) -> dict[str, str | int]:
        """Return the origin's entry in corpus.json."""
        return {
            "version": ", ".join(filter(None, self.versions)),
            "licence": " AND ".join(self.licences),
            "pairs": pairs,
            "texts": self.texts,
        }


@dataclass(slots=True)
class ReadResult:
    """Counts of what a source file contains; its rows are on disk.

    ``texts`` are the counts of text by language, ``text_rows`` the rows of each text file,
    ``domain_rows`` those of each text file and domain.
    ``empty`` is the reason why the file had no row at all.
    """

    counts: dict[Direction, DropCounts] = field(default_factory=lambda: defaultdict(DropCounts))
    texts: dict[str, DropCounts] = field(default_factory=lambda: defaultdict(DropCounts))
    sources: dict[str, SourceInfo] = field(default_factory=dict)
    text_rows: Counter[str] = field(default_factory=Counter)
    domain_rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: DroppedRows = field(default_factory=DroppedRows)
    empty: str = ""

    def add(self, other: "ReadResult") -> None:
        """Add the counts of another file; an origin keeps every version and licence."""
        for direction, counts in other.counts.items():
            self.counts[direction].add(counts)
        for code, counts in other.texts.items():
            self.texts[code].add(counts)
        for origin, info in other.sources.items():
            self.sources.setdefault(origin, SourceInfo()).add(info)
        self.text_rows.update(other.text_rows)
        self.domain_rows.update(other.domain_rows)
        self.dropped.add_all(other.dropped.rows)


def map_in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int
) -> Iterator[Result]:
    """Yield ``function(job)`` for each job, in order, computed by ``workers`` processes.

    Raises what the function raises, and DataError when the system kills a process.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    # spawn: a fork would copy locks that threads of the caller hold (torch's, for example)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C ends workers at once, without tracebacks
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool as error:
        raise DataError(
            "the system killed a worker process, perhaps because memory ran out: build with "
            "fewer workers (`--workers 1`)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def read_source_file(job: ReadJob) -> ReadResult:
    """Read and clean one source file into its folder; a file without rows is no error here."""
    with closing(_SourceFileReader(job)) as reader:
        try:
            for item in job.recipe.source.read(
                job.source_file, wanted=_language_filter(job.recipe)
            ):
                reader.add(item)
        except EmptyFileError as error:
            reader.found.empty = str(error)
    return reader.finish()


class _SourceFileReader:
    """Cleans the rows of one source file, and writes what is kept into the folder of its job."""

    def __init__(self, job: ReadJob) -> None:
        self._job, self._split = job, job.recipe.split
        self.found, self._cleaner = ReadResult(), PairCleaner(job.recipe.clean)
        self._spill, self._texts = PairSpill(job.pairs), _TextWriter(job.texts, self._split)
        self._keys = _SplitKeyWriter(self._split)

    def add(self, item: Pair | Text | RejectedPair) -> None:
        match item:
            case RejectedPair():
                self.found.counts[item.direction].read += 1
                self.found.counts[item.direction].dropped[item.reason] += 1
            case Text():
                self._add_text(item)
            case Pair():
                self._add_pair(item)

    def _info(self, item: Pair | Text) -> SourceInfo:
        if item.origin not in self.found.sources:
            version = self._job.source_file.version
            self.found.sources[item.origin] = SourceInfo([version], [item.licence])
        info = self.found.sources[item.origin]
        if item.licence not in info.licences:
            info.licences.append(item.licence)
        return info

    def _add_text(self, raw: Text) -> None:
        info, counts = self._info(raw), self.found.texts[raw.language]
        counts.read += 1
        text, reason = self._cleaner.clean_text(raw)
        if text is None:
            counts.dropped[reason] += 1
            self.found.dropped.add(DroppedRow(raw.language, reason, raw.text, origin=raw.origin))
            return
        info.texts += 1
        self._texts.add(text)

    def _add_pair(self, raw: Pair) -> None:
        self._info(raw)
        counts = self.found.counts[raw.direction]
        counts.read += 1
        pair, reason = self._cleaner.clean(raw)
        if pair is None:
            counts.dropped[reason] += 1
            direction = "-".join(raw.direction)
            self.found.dropped.add(
                DroppedRow(direction, reason, raw.source, raw.target, raw.origin)
            )
            return
        domain, allowed = self._split.domain_of(pair.origin), self._job.source_file.allowed_split
        self._spill.add(pair, rank=self._job.rank, allowed_split=allowed, domain=domain)
        self._keys.add(pair, allowed_split=allowed, domain=domain)

    def finish(self) -> ReadResult:
        """Write the split keys, and return the counts."""
        self.found.text_rows = self._texts.rows
        self.found.domain_rows = self._texts.domain_rows
        self._keys.write(self._job.keys)
        return self.found

    def close(self) -> None:
        self._spill.close()
        self._texts.close()


def english_side(pair: Pair) -> str:
    """Return the side whose hash decides the split: English if it is one, else the source."""
    return pair.target if pair.target_language == ENGLISH else pair.source


def _language_filter(recipe: CorpusRecipe) -> LanguageFilter:
    codes = {resolve_language(text).code for text in recipe.languages} | {ENGLISH}
    return (lambda code: code in codes) if recipe.languages else (lambda _: True)


class _SplitKeyWriter:
    """Collects the distinct split keys of sources, for the search for leaks (if there is one)."""

    def __init__(self, split: SplitConfig) -> None:
        self._split, self._enabled = split, split.near_duplicates.enabled or bool(split.domains)
        self._sources: set[tuple[str, str]] = set()

    def add(self, pair: Pair, *, allowed_split: str, domain: str) -> None:
        if self._enabled:
            self._sources.add((english_side(pair), "held-out" if domain else allowed_split))

    def write(self, path: Path) -> None:
        """Write one key per line after ``t`` (train) or ``h`` (held out), sorted."""
        lines = {
            f"{'t' if self._is_train(text, allowed) else 'h'}{split_key(text)}\n"
            for text, allowed in self._sources
        }
        path.write_text("".join(sorted(lines)), encoding="utf-8", newline="\n")

    def _is_train(self, text: str, allowed: str) -> bool:
        return allowed == "train" or (allowed == "any" and self._split.split_of(text) == "train")


class _TextWriter:
    """Writes monolingual texts, split by the same hash as sources."""

    def __init__(self, folder: Path, split: SplitConfig) -> None:
        self._folder, self._split = folder, split
        self._files = AppendFiles()
        self.rows: Counter[str] = Counter()
        self.domain_rows: Counter[tuple[str, str]] = Counter()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, found: Text) -> None:
        domain = self._split.domain_of(found.origin)
        name = text_file(found.language, domain or self._split.split_of_text(found.text))
        label = "\t" + escape_field(found.domain) if found.domain else ""
        self._files.write(self._folder / name, escape_field(found.text) + label + "\n")
        self.rows[name] += 1
        if found.domain:
            self.domain_rows[name, found.domain] += 1

    def close(self) -> None:
        self._files.close()
