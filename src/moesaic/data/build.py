"""Build: a recipe in, a finished corpus on disk out, whole or not at all."""

import json
import shutil
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256 as new_sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moesaic.core.errors import DataError
from moesaic.core.files import sha256, write_json
from moesaic.data.builders.named import CorpusRecipe, named_recipe
from moesaic.data.builders.source import Progress, Quiet, Unit, Wanted
from moesaic.data.clean import RULES, Cleaner
from moesaic.data.corpus import ABOUT, FORMAT, Corpus, pair_file, text_file
from moesaic.data.home import corpora_dir
from moesaic.data.languages import language
from moesaic.data.pair import Text
from moesaic.data.readers.tsv import escape
from moesaic.data.spill import Candidate, Direction, Spill, Tally
from moesaic.data.split import SPLITS, Split, digest64, split_key

ENGLISH = "eng_Latn"
REASONS = {rule.name: rule.why for rule in RULES} | {
    "duplicate": "the same pair was read before",
    "other_target": "more sources gave this source another target",
    "source_in_train": "held out by an extract, but its source is a train source",
    "target_in_train": "held out, but its target is a train target",
}


def build(
    what: CorpusRecipe | str, *, out: Path | None = None, progress: Progress | None = None
) -> Corpus:
    """Build a corpus by recipe or name, or open it when it is already there.

    ``out`` is the corpus directory, by default ``data/corpora/NAME``. A directory there that holds
    a corpus of another recipe is replaced; one that holds anything else is left alone (DataError).
    """
    recipe = named_recipe(what) if isinstance(what, str) else what
    listener = progress or Quiet()
    root = out or corpora_dir() / recipe.name
    ready = _finished(root, recipe)
    if ready:
        listener.say(f"{root}: already built")
        return ready
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.part-"))
    try:
        _Building(recipe, work, listener).run()
        _move(work, root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    corpus = Corpus.open(root)
    listener.say(f"{root}: {corpus.about['pairs']} pairs, {len(corpus.languages)} languages")
    return corpus


def recipe_hash(recipe: CorpusRecipe) -> str:
    """Return the hash that tells one recipe's corpus from another's."""
    text = json.dumps([FORMAT, recipe.plain()], sort_keys=True, ensure_ascii=False)
    return new_sha256(text.encode()).hexdigest()


def _finished(root: Path, recipe: CorpusRecipe) -> Corpus | None:
    if not (root / ABOUT).is_file():
        if root.exists() and any(root.iterdir()):
            raise DataError(f"{root}: holds something that is no corpus; choose another folder")
        return None
    try:
        corpus = Corpus.open(root)
    except DataError:
        return None
    if corpus.about["recipe_hash"] != recipe_hash(recipe):
        return None
    before, now = corpus.about.get("inputs", {}), _stamps(recipe)
    return corpus if not now or before == now else None


def _stamps(recipe: CorpusRecipe) -> dict[str, list[int]]:
    """Size and time of the user's own files; empty when they are gone: the corpus still stands."""
    stats = {str(path): path.stat() for path in recipe.source.inputs()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def _move(work: Path, root: Path) -> None:
    """Put the finished directory in place; an older corpus there goes only once ours is whole."""
    if root.exists():
        old = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.old-"))
        root.replace(old)
        work.replace(root)
        shutil.rmtree(old)
    else:
        work.replace(root)


@dataclass
class _Building:
    """One build under way: the folder it writes to, and everything counted so far."""

    recipe: CorpusRecipe
    work: Path
    progress: Progress
    tallies: dict[Direction, Tally] = field(default_factory=lambda: defaultdict(Tally))
    origins: Counter[str] = field(default_factory=Counter)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> None:
        units = self.recipe.source.fetch(progress=self.progress)
        spill = Spill(self.work / "spill")
        texts = _Texts(self.work, self.recipe.split)
        try:
            for rank, unit in enumerate(units):
                self.progress.say(f"reading {unit.name} {unit.version} ({rank + 1}/{len(units)})")
                self._read(unit, rank=rank, spill=spill, texts=texts)
        finally:
            spill.close()
            texts.close()
        kept, small = self._write_directions(spill)
        shutil.rmtree(self.work / "spill")
        self._add_texts(texts)
        self._describe(units, kept=kept, small=small, texts=texts)

    def _read(self, unit: Unit, *, rank: int, spill: Spill, texts: "_Texts") -> None:
        cleaner, wanted = Cleaner(self.recipe.clean), _wanted(self.recipe)
        for found in self.recipe.source.read(unit, wanted=wanted):
            if found.origin not in self.sources:
                self.sources[found.origin] = {"version": unit.version, "licence": found.licence}
            if isinstance(found, Text):
                texts.add(found)
                continue
            tally = self.tallies[found.direction]
            tally.read += 1
            pair, reason = cleaner.clean(found)
            if pair is None:
                tally.dropped[reason] += 1
            else:
                spill.add(pair, rank=rank, place=unit.place)

    def _write_directions(self, spill: Spill) -> tuple[list[dict[str, Any]], dict[str, int]]:
        kept: list[dict[str, Any]] = []
        small: dict[str, int] = {}
        for direction in spill.directions():
            tally = self.tallies[direction]
            writer = _DirectionWriter(self.work, direction, self.recipe.split, tally)
            for candidate in spill.chosen(direction, tally=tally):
                writer.add(candidate)
            counts = writer.close()
            pairs = sum(counts[s]["pairs"] for s in SPLITS)
            if pairs < self.recipe.min_pairs:
                small["-".join(direction)] = pairs
                writer.remove()
                continue
            self.origins.update(writer.origins)
            for split in SPLITS:
                self._add_file(pair_file(*direction, split), rows=counts[split]["pairs"])
            kept.append(
                {
                    "source": direction[0],
                    "target": direction[1],
                    "read": tally.read,
                    "dropped": dict(sorted((k, v) for k, v in tally.dropped.items() if v)),
                    "splits": counts,
                }
            )
        return kept, small

    def _add_texts(self, texts: "_Texts") -> None:
        for name, rows in sorted(texts.rows.items()):
            self._add_file(name, rows=rows)

    def _add_file(self, name: str, *, rows: int) -> None:
        path = self.work / name
        if rows == 0:
            path.unlink(missing_ok=True)
            return
        self.files[name] = {"rows": rows, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def _describe(
        self,
        units: tuple[Unit, ...],
        *,
        kept: list[dict[str, Any]],
        small: dict[str, int],
        texts: "_Texts",
    ) -> None:
        codes = {c for d in kept for c in (d["source"], d["target"])} | texts.languages
        if not codes:
            raise DataError(self._nothing_left(small))
        sources = {
            name: about | {"pairs": self.origins[name]}
            for name, about in sorted(self.sources.items())
        }
        about = {
            "format": FORMAT,
            "name": self.recipe.name,
            "moesaic": version("moesaic"),
            "recipe": self.recipe.plain(),
            "recipe_hash": recipe_hash(self.recipe),
            "inputs": _stamps(self.recipe),
            "languages": sorted(codes),
            "pairs": sum(f["rows"] for n, f in self.files.items() if n.endswith(".tsv")),
            "directions": kept,
            "too_small": small,
            "reasons": REASONS,
            "sources": sources,
            "read": [{"name": u.name, "version": u.version, "file": u.path.name} for u in units],
            "split_policy": "hash of the normalised source; held-out rows whose target is a train "
            "target are dropped",
            "files": self.files,
        }
        write_json(self.work / ABOUT, about)

    def _nothing_left(self, small: dict[str, int]) -> str:
        read = sum(t.read for t in self.tallies.values())
        dropped: Counter[str] = Counter()
        for tally in self.tallies.values():
            dropped.update(tally.dropped)
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common(4))
        few = (
            f"; {len(small)} direction(s) under min_pairs={self.recipe.min_pairs}" if small else ""
        )
        start = f"corpus {self.recipe.name}: nothing to keep of {read} pairs read"
        return f"{start} ({why or 'none'}){few}"


def _wanted(recipe: CorpusRecipe) -> Wanted:
    codes = {language(text).code for text in recipe.languages} | {ENGLISH}
    return (lambda code: code in codes) if recipe.languages else (lambda _: True)


class _DirectionWriter:
    """Writes one direction's splits; held-out rows wait until all train targets are known."""

    def __init__(self, work: Path, direction: Direction, split: Split, tally: Tally) -> None:
        self._paths = {s: work / pair_file(*direction, s) for s in SPLITS}
        self._train = self._paths["train"].open("w", encoding="utf-8", newline="\n")
        self._held = work / f"held-{'-'.join(direction)}"
        self._waiting = self._held.open("w", encoding="utf-8", newline="\n")
        self._split, self._tally = split, tally
        self._english = 1 if direction[1] == ENGLISH else 0
        self._sources, self._targets = array("Q"), array("Q")
        self._counts = {s: Counter[str]() for s in SPLITS}
        self.origins: Counter[str] = Counter()

    def add(self, row: Candidate) -> None:
        # English decides when it is there, so both directions of a pair fall into one split
        text = row.target if self._english else row.source
        split = self._split.of(text) if row.place == "any" else row.place
        if split == "held-out":
            split = self._split.held_out(text)
        line = f"{escape(row.source)}\t{escape(row.target)}\t{escape(row.origin)}\n"
        if split == "train":
            self._train.write(line)
            self._targets.append(digest64(split_key(row.target)))
            if row.place != "any":
                self._sources.append(digest64(split_key(row.source)))
            self._count(row, split)
        else:
            marks = f"{digest64(split_key(row.source))}\t{digest64(split_key(row.target))}"
            self._waiting.write(f"{split}\t{marks}\t{line}")

    def _count(self, row: Candidate, split: str) -> None:
        self._counts[split].update(_size(row.source, row.target))
        self.origins[row.origin] += 1

    def close(self) -> dict[str, dict[str, int]]:
        """Write the held-out rows that leak nothing; return counts per split."""
        self._train.close()
        self._waiting.close()
        streams = {s: self._paths[s].open("w", encoding="utf-8", newline="\n") for s in SPLITS[1:]}
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
                self._counts[split].update(_size(fields[0], fields[1]))
                self.origins[fields[2].rstrip("\n")] += 1
        for stream in streams.values():
            stream.close()
        self._held.unlink()
        return {s: {k: self._counts[s][k] for k in _size("", "")} for s in SPLITS}

    def _held_out(self) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
        with self._held.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                split, source, target, *fields = line.split("\t")
                yield split, (int(source), int(target)), fields

    def remove(self) -> None:
        """Take the direction's files away again."""
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def _has(marks: np.ndarray, mark: int) -> bool:
    place = int(np.searchsorted(marks, np.uint64(mark)))
    return place < len(marks) and int(marks[place]) == mark


def _size(source: str, target: str) -> dict[str, int]:
    return {
        "pairs": 1,
        "source_characters": len(source),
        "target_characters": len(target),
        "source_words": len(source.split()),
        "target_words": len(target.split()),
    }


class _Texts:
    """Writes monolingual texts, split like sources."""

    def __init__(self, work: Path, split: Split) -> None:
        self._work, self._split = work, split
        self._streams: dict[str, TextIO] = {}
        self.rows: Counter[str] = Counter()
        self.languages: set[str] = set()

    def add(self, found: Text) -> None:
        text = " ".join(found.text.split())
        if not text:
            return
        name = text_file(found.language, self._split.of(text))
        if name not in self._streams:
            self._streams[name] = (self._work / name).open("w", encoding="utf-8", newline="\n")
        self._streams[name].write(escape(text) + "\n")
        self.rows[name] += 1
        self.languages.add(found.language)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
