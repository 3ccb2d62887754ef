"""Writing token shards: every text of a corpus is encoded once; the directory appears complete.

Texts go to one part file per language and split while pairs are read; the parts are then
concatenated. Memory: 4 bytes per text, plus a digest per distinct text of the languages that later
directions still need.
"""

import hashlib
import os
import shutil
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moesaic.core.errors import DataError
from moesaic.core.files import os_errors_named, sha256, write_json
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.data_home import data_home
from moesaic.corpus.pair import Text
from moesaic.corpus.sources.text_source import Progress, ignore_progress
from moesaic.corpus.split import SPLITS
from moesaic.data.shards_manifest import DATA_FILES, FORMAT, MANIFEST
from moesaic.data.token_shards import TokenShards, text_key
from moesaic.data.tokenizer import Tokenizer, encode_on_all_cores

_CHUNK = 4096
_CHUNK_CHARACTERS = 1 << 22  # of documents that are encoded together

_SHOWN_EVERY = 10  # directions

T = TypeVar("T")


def shards_fingerprint(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return a hash of a corpus and a tokenizer."""
    text = f"{FORMAT} {corpus.fingerprint} {tokenizer.fingerprint}"
    return hashlib.sha256(text.encode()).hexdigest()


def cached_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    root: Path | None = None,
    progress: Progress = ignore_progress,
) -> TokenShards:
    """Open the shards of this corpus and tokenizer, written first if they do not exist."""
    name = shards_fingerprint(corpus, tokenizer)[:16]
    path = (root or data_home() / "shards") / name
    if (path / MANIFEST).is_file():
        return TokenShards.open(path)
    return write_shards(corpus, tokenizer, out=path, progress=progress)


def write_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    out: Path | str,
    progress: Progress = ignore_progress,
) -> TokenShards:
    """Encode a corpus to ``out``, which appears when it is complete.

    ``progress`` is called with a line of text after some directions. Raises DataError if ``out``
    exists or the corpus has no text.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already; delete it to write the shards again")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with os_errors_named(out, action="token shards cannot be written"):
        part.mkdir(parents=True)
        try:
            with encode_on_all_cores():
                manifest = _ShardWriter(part, tokenizer, progress).write(corpus)
            manifest |= {
                "format": FORMAT,
                "fingerprint": shards_fingerprint(corpus, tokenizer),
                "corpus": corpus.fingerprint,
                "tokenizer": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            }
            write_json(part / MANIFEST, manifest)
            _publish(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return TokenShards.open(out)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest little-endian unsigned dtype for all ids."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def file_manifest(path: Path) -> dict[str, Any]:
    """Return size and hash of each data file, for ``shards.json``; flush the files to disk."""
    table = {}
    for name in DATA_FILES:
        with (path / name).open("rb") as stream:
            os.fsync(stream.fileno())
        table[name] = {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
    return table


class _TextTable:
    """The texts of one language and split: a file of tokens and a length per text."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kind = token_dtype(tokenizer.vocab_size)
        self._seen: dict[bytes, int] = {}
        self.path = path
        self.lengths = array("I")

    def add(self, texts: Sequence[str]) -> array:
        """Return the ids of ``texts``, storing new ones."""
        ids, new = array("I"), []
        for text in texts:
            key = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
            number = self._seen.setdefault(key, len(self._seen))
            if number == len(self.lengths) + len(new):
                new.append(text)
            ids.append(number)
        if new:
            rows = [encoded.ids for encoded in self._tokenizer.encode_with_copies(new)]
            self.lengths.extend(map(len, rows))
            flat = array("I", (token for row in rows for token in row))
            # opened for each chunk: there may be more domains than a process may open files
            with self.path.open("ab") as stream:
                stream.write(np.frombuffer(flat, dtype=np.uint32).astype(self._kind).tobytes())
        return ids

    def close(self) -> None:
        """Free the digests: no later direction has this language."""
        self._seen = {}


class _ShardWriter:
    """Writes the files of a shard directory, and returns its manifest."""

    def __init__(self, root: Path, tokenizer: Tokenizer, progress: Progress) -> None:
        self._root = root
        self._tokenizer = tokenizer
        self._progress = progress
        self._tables: dict[str, _TextTable] = {}
        self._keys: dict[tuple[str, str], list[str]] = defaultdict(list)  # of a language and split
        self._pairs: dict[str, int] = {}

    def write(self, corpus: Corpus) -> dict[str, Any]:
        for split in SPLITS:
            self._add_split(corpus, split)
        texts = self._join_texts()
        if not texts:
            raise DataError(f"corpus {corpus.fingerprint[:12]} has no text to encode")
        pairs = self._join_pairs(texts)
        kind = token_dtype(self._tokenizer.vocab_size)
        table = file_manifest(self._root)
        return {"token_type": kind.str, "texts": texts, "pairs": pairs, "files": table}

    def _add_split(self, corpus: Corpus, split: str) -> None:
        directions = sorted(corpus.directions)
        last = {code: n for n, pair in enumerate(directions) for code in pair}
        for n, (source, target) in enumerate(directions):
            if n % _SHOWN_EVERY == _SHOWN_EVERY - 1:
                self._progress(f"encoding {split} text: direction {n + 1} of {len(directions)}")
            self._add_pairs(corpus, source, target, split)
            for code in (source, target):
                if last[code] == n:
                    self._add_texts(corpus, code, split)
        for code in sorted(set(corpus.languages) - set(last)):
            self._add_texts(corpus, code, split)

    def _table(self, code: str, split: str, domain: str = "") -> _TextTable:
        key = text_key(code, split=split, domain=domain)
        if key not in self._tables:
            path = self._root / f"texts-{len(self._tables)}.part"
            self._keys[code, split].append(key)
            self._tables[key] = _TextTable(path, self._tokenizer)
        return self._tables[key]

    def _add_pairs(self, corpus: Corpus, source: str, target: str, split: str) -> None:
        left, right = self._table(source, split), self._table(target, split)
        key, count = f"{source}-{target}.{split}", 0
        with (self._root / f"{key}.pairs").open("wb") as stream:
            for chunk in _chunks(corpus.iter_pairs(source, target, split=split)):
                numbers = [
                    left.add([pair.source for pair in chunk]),
                    right.add([pair.target for pair in chunk]),
                ]
                stream.write(np.array(numbers, dtype="<u4").T.tobytes())
                count += len(chunk)
        self._pairs[key] = count

    def _add_texts(self, corpus: Corpus, code: str, split: str) -> None:
        self._table(code, split)  # there is a range even without a text, for pairs
        for chunk in _text_chunks(corpus.iter_texts(code, split=split)):
            for domain, texts in chunk.items():
                self._table(code, split, domain).add(texts)
        for key in self._keys[code, split]:
            self._tables[key].close()

    def _join_texts(self) -> dict[str, Any]:
        ranges, start, end = {}, 0, np.uint64(0)
        with (
            (self._root / "tokens.bin").open("wb") as tokens,
            (self._root / "offsets.bin").open("wb") as offsets,
        ):
            offsets.write(end.astype("<u8").tobytes())
            for key, table in sorted(self._tables.items()):
                lengths = np.frombuffer(table.lengths, dtype=np.uint32)
                count, total = len(lengths), int(lengths.sum(dtype=np.uint64))
                offsets.write((end + np.cumsum(lengths, dtype=np.uint64)).astype("<u8").tobytes())
                if count:
                    with table.path.open("rb") as stream:
                        shutil.copyfileobj(stream, tokens, 1 << 20)
                    table.path.unlink()
                    ranges[key] = {"start": start, "count": count, "tokens": total}
                start, end = start + count, end + np.uint64(total)
        return ranges

    def _join_pairs(self, texts: dict[str, Any]) -> dict[str, Any]:
        ranges, start = {}, 0
        with (self._root / "pairs.bin").open("wb") as out:
            for key, count in sorted(self._pairs.items()):
                path = self._root / f"{key}.pairs"
                local = np.fromfile(path, dtype="<u4").reshape(-1, 2)
                path.unlink()
                if not count:
                    continue
                name, _, split = key.rpartition(".")
                sides = [f"{code}.{split}" for code in name.split("-")]
                base = np.array([texts[side]["start"] for side in sides], dtype=np.uint32)
                out.write((local + base).astype("<u4").tobytes())
                tokens = [self._side_tokens(side, local[:, i]) for i, side in enumerate(sides)]
                ranges[key] = {"start": start, "count": count}
                ranges[key] |= {"source_tokens": tokens[0], "target_tokens": tokens[1]}
                start += count
        return ranges

    def _side_tokens(self, key: str, numbers: np.ndarray) -> int:
        lengths = np.frombuffer(self._tables[key].lengths, dtype=np.uint32)
        return int(lengths[numbers].sum(dtype=np.uint64))


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    stream = iter(items)
    while chunk := list(islice(stream, _CHUNK)):
        yield chunk


def _text_chunks(texts: Iterable[Text]) -> Iterator[dict[str, list[str]]]:
    """Yield chunks of texts by domain, each of bounded size: documents may be long."""
    chunk: dict[str, list[str]] = {}
    count = characters = 0
    for text in texts:
        chunk.setdefault(text.domain, []).append(text.text)
        count, characters = count + 1, characters + len(text.text)
        if count == _CHUNK or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, count, characters = {}, 0, 0
    if chunk:
        yield chunk


def _publish(part: Path, out: Path) -> None:
    try:
        part.rename(out)
    except OSError:
        if not (out / MANIFEST).is_file():  # another process wrote the same shards first
            raise
