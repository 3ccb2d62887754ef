"""Building a corpus: from a recipe to a finished corpus on disk, complete or not at all."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesaic.core.config_upgrade import upgrade_config
from moesaic.core.errors import DataError, UserError
from moesaic.core.files import os_errors_named, write_json
from moesaic.corpus.cleaning import CLEANING_RULES
from moesaic.corpus.corpus import Corpus, file_entry, text_file
from moesaic.corpus.corpus_manifest import (
    CORPUS_FORMAT,
    CORPUS_MANIFEST,
    recorded_text_rules,
)
from moesaic.corpus.corpus_recipes import CorpusRecipe, named_corpus
from moesaic.corpus.data_home import corpora_dir
from moesaic.corpus.dropped_rows import DROPPED_FILE, DroppedRow
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.read_sources import ReadJob, ReadResult, map_in_order, read_source_file
from moesaic.corpus.readers.gettext import PLURAL_FORMS
from moesaic.corpus.readers.keyed_text import DISAGREE
from moesaic.corpus.resolve_conflicts import (
    DirectionJob,
    DirectionResult,
    remove_held_out,
    resolve_conflicts,
)
from moesaic.corpus.sources.local_files import printable_path
from moesaic.corpus.sources.text_source import Progress, SourceFile, ignore_progress
from moesaic.corpus.spill import Direction, PairSpill
from moesaic.corpus.split import SPLITS, LeakedSources, find_leaks

MAX_DOMAINS = 1000
"""Domains of documents: each is a stream of its own in training, and a row in reports."""

DROP_REASONS = {rule.name: rule.why for rule in CLEANING_RULES} | {
    DISAGREE: "two texts under one key, but their numbers or inline elements differ",
    PLURAL_FORMS: "plural forms, but no formula in the catalogue's header tells them apart",
    "duplicate": "the same pair was read before",
    "other_target": "another target of this source occurs more often",
    "source_in_train": "held out by its folder or domain, but its source is a train source",
    "near_train": "held out, but its source is almost a train source (see split.near_duplicates)",
    "target_in_train": "held out, but its target is a train target",
    "held_out_pair": "text in one language that is a side of a held-out pair",
}


def build_corpus(
    recipe_or_name: CorpusRecipe | str,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    workers: int = 1,
) -> Corpus:
    """Build a corpus by recipe or name, or open it if it exists already.

    ``workers`` processes read and write; the corpus is the same for any number. More than one
    needs a script whose entry point is guarded by ``if __name__ == "__main__"``.

    ``out`` is the corpus directory, by default ``corpora/NAME`` in the data home. A corpus of
    another recipe there is replaced; a directory of anything else is not touched (DataError).
    """
    recipe = named_corpus(recipe_or_name) if isinstance(recipe_or_name, str) else recipe_or_name
    listener = progress or ignore_progress
    root = out or corpora_dir() / recipe.name
    ready = _open_finished(root, recipe)
    if ready:
        listener(f"{root}: already built")
        return ready
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.part-"))
    try:
        _CorpusBuilder(recipe, work, listener, workers).run()
        _publish(work, root)
    except OSError as error:
        if error.filename is not None:  # of a user's file, perhaps; a failed write has no name
            raise
        with os_errors_named(root, action="cannot be written"):
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Corpus.open(root)


def _open_finished(root: Path, recipe: CorpusRecipe) -> Corpus | None:
    if not (root / CORPUS_MANIFEST).is_file():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DataError(f"{root}: contains files that are not a corpus; choose another folder")
        return None
    try:
        corpus = Corpus.open(root)
        built_from = CorpusRecipe.from_dict(_upgraded(corpus.manifest["recipe"]))
    except UserError:
        return None
    if built_from != recipe:
        return None
    before, now = corpus.manifest.get("inputs", {}), _file_stamps(recipe)
    return corpus if not now or before == now else None


def _upgraded(written: object) -> object:
    """Return a recipe as an earlier version wrote it, with the text rules that it had."""
    recipe, _ = upgrade_config(written, config="CorpusRecipe")
    clean = recipe.get("clean", {}) if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(clean, dict):
        return recipe
    return recipe | {"clean": clean | {"text_rules": recorded_text_rules(recipe).to_dict()}}


def _file_stamps(recipe: CorpusRecipe) -> dict[str, list[int]]:
    """Return size and time of the user's files; a corpus stays valid when they are gone."""
    stats = {printable_path(path): path.stat() for path in recipe.source.inputs()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def _publish(work: Path, root: Path) -> None:
    """Move the finished directory into place, replacing an older corpus there."""
    work.chmod(root.parent.stat().st_mode & 0o777)  # mkdtemp made it for its owner alone
    try:
        work.replace(root)
        return
    except OSError:  # there is a corpus, perhaps since a moment ago: by another process
        if not root.is_dir():
            raise
    old = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.old-"))
    root.replace(old)
    try:
        work.replace(root)
    except OSError:
        old.replace(root)
        raise
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class _CorpusBuilder:
    """The state of one build: the folder that it writes to, and all counts so far."""

    recipe: CorpusRecipe
    work: Path
    progress: Progress
    workers: int
    result: ReadResult = field(default_factory=ReadResult)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        source_files = self.recipe.source.fetch(progress=self.progress)
        spill, keys = PairSpill(self.work / "spill"), self.work / "keys"
        self._read_source_files(
            [source_file for source_file in source_files if not source_file.missing_reason],
            spill=spill,
            keys=keys,
        )
        # a package that could not be fetched is reported by itself
        self.recipe.split.check_domains([*self.result.sources, *(s.name for s in source_files)])
        if self.recipe.split.near_duplicates.enabled:
            self.progress("searching the held-out sources for near-duplicates")
        leaks = find_leaks(keys, near_duplicates=self.recipe.split.near_duplicates)
        keys.unlink()
        directions = list(dict.fromkeys(which.direction for which in spill.bins()))
        self.progress(f"writing {len(directions)} direction{'s' * (len(directions) != 1)}")
        written = list(self._resolve_directions(directions, leaks=leaks))
        shutil.rmtree(self.work / "spill")
        self._add_texts()
        self._write_manifest(source_files, written)

    def _read_source_files(
        self, source_files: list[SourceFile], *, spill: PairSpill, keys: Path
    ) -> None:
        """Read every source file; join their output in order."""
        keys.touch()
        jobs = [
            ReadJob(self.recipe, source_file, rank, self.work / f"file-{rank:06d}")
            for rank, source_file in enumerate(source_files)
        ]
        results = map_in_order(read_source_file, jobs, workers=min(self.workers, max(1, len(jobs))))
        for job, result in zip(jobs, results, strict=True):
            name = f"{job.source_file.name} {job.source_file.version}"
            self.progress(f"read {name} ({job.rank + 1}/{len(jobs)})")
            if result.empty:
                self.progress(f"left out: {result.empty}")
                self.empty[printable_path(job.source_file.path)] = result.empty
            self.result.add(result)
            spill.append_from(job.pairs)
            for path in (*job.texts.iterdir(), job.keys):
                target = keys if path == job.keys else self.work / path.name
                with target.open("ab") as joined, path.open("rb") as part:
                    shutil.copyfileobj(part, joined)
            shutil.rmtree(job.folder)

    def _resolve_directions(
        self, directions: list[Direction], *, leaks: LeakedSources
    ) -> Iterator[DirectionResult]:
        jobs = [
            DirectionJob(
                direction,
                self.work / "spill",
                self.work,
                self.recipe.split,
                leaks,
                self.result.counts[direction],
                self.recipe.min_pairs,
            )
            for direction in directions
        ]
        for result in map_in_order(
            resolve_conflicts, jobs, workers=min(self.workers, max(1, len(jobs)))
        ):
            self.result.counts[result.direction] = result.counts
            self.files |= result.files
            self.result.dropped.add_all(result.dropped.rows)
            yield result

    def _add_texts(self) -> None:
        """Add the text files, without train texts that are a side of a held-out pair."""
        held_out = [
            name for name in self.files if name.endswith(".tsv") and not name.endswith(".train.tsv")
        ]
        for name, rows in sorted(self.result.text_rows.items()):
            code, _, split = name.removesuffix(".txt").partition(".")
            counts = self.result.texts[code]
            if split == "train":
                pairs = [self.work / n for n in held_out if code in n.partition(".")[0].split("-")]
                leaked = remove_held_out(self.work / name, pairs=pairs, code=code)
                counts.dropped["held_out_pair"] += len(leaked)
                self.result.dropped.add_all(
                    DroppedRow(code, "held_out_pair", text) for text in leaked
                )
                rows -= len(leaked)
            if rows:
                self.files[name] = file_entry(self.work / name, rows=rows)
            else:
                (self.work / name).unlink()

    def _write_manifest(
        self, source_files: tuple[SourceFile, ...], written: list[DirectionResult]
    ) -> None:
        kept = [s for s in written if s.pairs >= self.recipe.min_pairs]
        small = {"-".join(s.direction): s.pairs for s in written if s not in kept}
        text_languages = {n.partition(".")[0] for n in self.files if n.endswith(".txt")}
        codes = {code for s in kept for code in s.direction} | text_languages
        if not codes:
            raise DataError(self._nothing_left_message(small))
        wanted = {text: resolve_language(text).code for text in self.recipe.languages}
        if lost := [text for text, code in wanted.items() if code not in codes]:
            self.progress(f"languages: nothing is kept in {', '.join(lost)}")
        self.result.dropped.write(self.work / DROPPED_FILE)
        manifest = {
            "format": CORPUS_FORMAT,
            "name": self.recipe.name,
            "moesaic": version("moesaic"),
            "recipe": self.recipe.to_dict(),
            "inputs": _file_stamps(self.recipe),
            "languages": sorted(codes),
            "pairs": sum(f["rows"] for n, f in self.files.items() if n.endswith(".tsv")),
            "directions": [s.manifest_entry for s in kept],
            "texts": self._text_counts(),
            "domains": {d.name: list(d.packages) for d in self.recipe.split.domains},
            "too_small": small,
            "reasons": DROP_REASONS,
            "sources": self._sources(kept),
            "read": [
                {"name": u.name, "version": u.version, "file": printable_path(Path(u.path.name))}
                for u in source_files
                if not u.missing_reason
            ],
            "missing": {u.name: u.missing_reason for u in source_files if u.missing_reason},
            "empty": self.empty,
            "split_policy": "hash of the normalised source; held-out rows whose target is a train "
            "target are dropped",
            "files": self.files,
        }
        write_json(self.work / CORPUS_MANIFEST, manifest)

    def _sources(self, kept: list[DirectionResult]) -> dict[str, Any]:
        pairs: Counter[str] = Counter()
        for direction in kept:
            pairs.update(direction.origins)
        return {
            origin: info.manifest_entry(pairs=pairs[origin])
            for origin, info in sorted(self.result.sources.items())
        }

    def _text_counts(self) -> dict[str, Any]:
        """Rows of text by language: read, dropped by reason, and kept by split."""
        names = (*SPLITS, *(domain.name for domain in self.recipe.split.domains))
        found = {}
        for code, counts in sorted(self.result.texts.items()):
            rows = {name: self.files.get(text_file(code, name), {}) for name in names}
            splits = {name: entry.get("rows", 0) for name, entry in rows.items()}
            found[code] = {"read": counts.read, "dropped": counts.by_reason, "splits": splits}
            if domains := self._domain_counts(code, names):
                found[code]["domains"] = domains
        return found

    def _domain_counts(self, code: str, splits: Sequence[str]) -> dict[str, dict[str, int]]:
        """Documents of a language by domain and split. Raises DataError: too many domains."""
        rows = self.result.domain_rows
        files = {split: text_file(code, split) for split in splits}
        domains = sorted({domain for name, domain in rows if name in files.values()})
        if len(domains) > MAX_DOMAINS:
            raise DataError(
                f"corpus {self.recipe.name}: {len(domains):,} domains, such as "
                f"{', '.join(domains[:3])}, at most {MAX_DOMAINS:,} are kept apart; choose another "
                "domain rule (DomainOfFolder, NamedDomain)"
            )
        return {d: {s: rows[file, d] for s, file in files.items()} for d in domains}

    def _nothing_left_message(self, small: dict[str, int]) -> str:
        everything = [*self.result.counts.values(), *self.result.texts.values()]
        if self.empty and not everything:
            return next(iter(self.empty.values()))
        read = sum(counts.read for counts in everything)
        dropped: Counter[str] = Counter()
        for counts in everything:
            dropped.update(counts.dropped)
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common(4))
        few = (
            f"; {len(small)} direction(s) under min_pairs={self.recipe.min_pairs}" if small else ""
        )
        start = f"corpus {self.recipe.name}: nothing to keep of {read} rows read"
        return f"{start} ({why or 'none'}){few}"
