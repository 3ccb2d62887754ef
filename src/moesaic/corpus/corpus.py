"""A corpus on disk: pairs and texts by split, with origins, licences and counts of dropped rows.

``DIR/corpus.json`` is its manifest; ``DIR/{src}-{tgt}.{split}.tsv`` has a pair per line: source,
target, origin (escaped, see readers/tsv.py); ``DIR/{lang}.{split}.txt`` has a text in one language
per line, and the domain of a document after a tab.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Any

from moesaic.core.errors import DataError, did_you_mean, listed
from moesaic.core.files import sha256
from moesaic.corpus.corpus_manifest import read_corpus_manifest, recorded_text_rules
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers.text_lines import read_lines
from moesaic.corpus.readers.tsv import read_rows, unescape_field
from moesaic.corpus.split import SPLITS, digest64
from moesaic.corpus.text_rules import TextRules


def pair_file(source: str, target: str, split: str) -> str:
    """Return the file name of one direction's split."""
    return f"{source}-{target}.{split}.tsv"


def text_file(code: str, split: str) -> str:
    """Return the file name of one language's texts."""
    return f"{code}.{split}.txt"


def file_entry(path: Path, *, rows: int) -> dict[str, Any]:
    """Return the manifest's entry of a file."""
    return {"rows": rows, "bytes": path.stat().st_size, "sha256": sha256(path)}


@dataclass(frozen=True)
class Corpus:
    """A finished corpus. ``manifest`` is corpus.json; ``open`` checks it and its files."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Corpus":
        """Open a corpus directory. Raises DataError: no corpus, wrong fields, files missing."""
        root = Path(path)
        return cls(root, read_corpus_manifest(root).model_dump(by_alias=True))

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of all languages, sorted."""
        return tuple(self.manifest["languages"])

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """(source, target) codes as stored; each can be read in reverse as well."""
        return tuple((d["source"], d["target"]) for d in self.manifest["directions"])

    @property
    def splits(self) -> tuple[str, ...]:
        """Train, valid and test, then the domains held out whole."""
        return (*SPLITS, *self.manifest.get("domains", {}))

    @property
    def fingerprint(self) -> str:
        """A hash of all files of the corpus."""
        parts = [f"{name} {f['sha256']}" for name, f in sorted(self.manifest["files"].items())]
        return new_sha256("\n".join(parts).encode()).hexdigest()

    @property
    def text_rules(self) -> TextRules:
        """The rules that its texts passed."""
        return recorded_text_rules(self.manifest["recipe"])

    def count(self, source: str, target: str, *, split: str = "train") -> int:
        """Return the number of pairs of a direction or its reverse."""
        name = pair_file(*self._stored_direction(source, target), split)
        return self.manifest["files"].get(name, {}).get("rows", 0)

    def describe_empty_splits(self) -> list[str]:
        """Return a sentence for each of valid and test that has no pair of some direction.

        In a corpus of documents alone: for each that has no document.
        """
        sentences = []
        for split, use in (("valid", "validate"), ("test", "score")):
            texts = [entry["splits"].get(split, 0) for entry in self.manifest["texts"].values()]
            if not self.directions and not sum(texts):
                sentences.append(
                    f"no {split} documents: nothing to {use} on; more or smaller documents "
                    f"(document: EachParagraph), or a larger share (split: {{{split}: 0.2}}), help"
                )
            empty = [f"{s}-{t}" for s, t in self.directions if not self.count(s, t, split=split)]
            if empty:
                sentences.append(
                    f"no {split} pairs of {listed(empty)}: nothing to {use} on (of "
                    f"{len(self.directions)} directions)"
                )
        return sentences

    def pairs(self, split: str = "train") -> Iterator[Pair]:
        """Yield every pair of a split, direction by direction as stored."""
        for source, target in self.directions:
            yield from self.iter_pairs(source, target, split=split)

    def iter_pairs(self, source: str, target: str, *, split: str = "train") -> Iterator[Pair]:
        """Yield the pairs of a direction, reversed where the corpus stores the reverse direction.

        Raises DataError when the corpus has no such direction or split.
        """
        stored = self._stored_direction(source, target)
        reverse = stored[0] != self._known_language(source)
        licences = {name: s["licence"] for name, s in self.manifest["sources"].items()}
        path = self._split_path(pair_file(*stored, split), split=split)
        for row in read_rows(path, columns=3) if path else ():
            origin = unescape_field(row.fields[2])
            pair = Pair(
                unescape_field(row.fields[0]),
                unescape_field(row.fields[1]),
                *stored,
                origin,
                licences.get(origin, ""),
            )
            yield pair.reversed() if reverse else pair

    def iter_texts(self, code: str, *, split: str = "train") -> Iterator[Text]:
        """Yield the distinct texts of a language: its side of the pairs, then monolingual text."""
        seen: set[int] = set()
        for text in self._texts(self._known_language(code), split=split):
            digest = digest64(text.text)
            if digest not in seen:
                seen.add(digest)
                yield text

    def verify(self) -> None:
        """Compare every file with its hash. Raises DataError naming an altered one."""
        for name, known in self.manifest["files"].items():
            if sha256(self.path / name) != known["sha256"]:
                raise DataError(
                    f"{self.path / name}: altered since the corpus was built (its hash differs); "
                    "build it again"
                )

    def _texts(self, code: str, *, split: str) -> Iterator[Text]:
        for direction in self.directions:
            if code in direction:
                for pair in self.iter_pairs(*direction, split=split):
                    text = pair.source if code == direction[0] else pair.target
                    yield Text(text, code, pair.origin, pair.licence)
        path = self._split_path(text_file(code, split), split=split)
        for _, line in read_lines(path) if path else ():
            text, _, domain = line.partition("\t")
            yield Text(unescape_field(text), code, domain=unescape_field(domain))

    def _known_language(self, code: str) -> str:
        found = resolve_language(code).code
        if found not in self.languages:
            raise DataError(
                f"corpus {self.name} has no {found}: it has {', '.join(self.languages)}"
                f"{did_you_mean(found, self.languages)}"
            )
        return found

    @cached_property
    def _direction_set(self) -> frozenset[tuple[str, str]]:
        return frozenset(self.directions)

    def _stored_direction(self, source: str, target: str) -> tuple[str, str]:
        pair = self._known_language(source), self._known_language(target)
        for direction in (pair, pair[::-1]):
            if direction in self._direction_set:
                return direction[0], direction[1]
        raise DataError(f"corpus {self.name} has no pairs between {pair[0]} and {pair[1]}")

    def _split_path(self, name: str, *, split: str) -> Path | None:
        if split not in self.splits:
            raise DataError(
                f'corpus {self.name}: unknown split "{split}": expected one of '
                f"{', '.join(self.splits)}{did_you_mean(split, self.splits)}"
            )
        return self.path / name if name in self.manifest["files"] else None
