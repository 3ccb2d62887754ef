"""The manifest of token shards, ``shards.json``, checked with the three files that it describes."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from moesaic.core.errors import DataError, printable
from moesaic.core.file_reader import (
    MIB,
    Count,
    FileEntry,
    FileKind,
    FileShape,
    parse_json,
    parse_shape,
    read_bytes,
    require_no_link_out,
)
from moesaic.data.ragged import IntArray

FORMAT = 1
MANIFEST = "shards.json"
DATA_FILES = ("tokens.bin", "offsets.bin", "pairs.bin")
OFFSET_TYPE, PAIR_TYPE = np.dtype("<u8"), np.dtype("<u4")
SHARDS_FILE = FileKind(
    name="manifest of token shards",
    max_bytes=64 * MIB,
    error=DataError,
    way_out="delete its directory, and it is written again",
)
_CHUNK = 1 << 20  # values that are checked at a time


class _Shape(FileShape):
    kind: ClassVar[FileKind] = SHARDS_FILE


class TextRange(_Shape):
    """Texts of one language and split: ``start`` to ``start + count``."""

    start: Count
    count: Count
    tokens: Count


class PairRange(_Shape):
    """Pairs of one direction and split: ``start`` to ``start + count``."""

    start: Count
    count: Count
    source_tokens: Count
    target_tokens: Count


class ShardsManifest(_Shape):
    """The fields of shards.json."""

    format: int
    token_type: Literal["<u2", "<u4"]
    texts: dict[str, TextRange]
    pairs: dict[str, PairRange]
    files: dict[str, FileEntry]
    fingerprint: str
    corpus: str
    tokenizer: str
    vocab_size: int = Field(ge=1, le=2**32)


def read_shards_manifest(folder: Path) -> ShardsManifest:
    """Read the manifest of a shard directory, and check sizes, offsets and ranges of its files.

    Time is linear in texts and pairs, memory is bounded. Raises DataError.
    """
    path = folder / MANIFEST
    if not path.exists():
        expected = f"expected {MANIFEST} and {', '.join(DATA_FILES)}"
        raise DataError(f"{folder}: no shards here; {expected}")
    data = read_bytes(path, SHARDS_FILE)
    written = parse_json(data, kind=SHARDS_FILE, where=path)
    found = written.get("format") if isinstance(written, dict) else "no format"
    if found != FORMAT:
        way_out = f"expected {FORMAT}; delete the directory, and it is written again"
        raise DataError(f"{folder}: shard format {printable(str(found))}, {way_out}")
    manifest = parse_shape(data, ShardsManifest, kind=SHARDS_FILE, where=path)
    _check_sizes(folder, manifest)
    _check_ranges(folder, manifest)
    return manifest


def map_array(path: Path, kind: np.dtype[Any]) -> IntArray:
    """Return a file as a read-only array of ``kind``, mapped into memory."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=kind)
    # a plain view: indexing a memmap object is ten times slower
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))


def _check_sizes(folder: Path, manifest: ShardsManifest) -> None:
    widths = (np.dtype(manifest.token_type).itemsize, 8, 8)
    for name, width in zip(DATA_FILES, widths, strict=True):
        require_no_link_out(folder, name, kind=SHARDS_FILE)
        path = folder / name
        if name not in manifest.files:
            raise SHARDS_FILE.problem(folder / MANIFEST, f"files: {name} is not there")
        found = path.stat().st_size if path.is_file() else -1
        expected = manifest.files[name].bytes
        if found != expected:
            state = "missing" if found < 0 else f"{found} bytes, expected {expected}"
            raise DataError(f"{path}: {state}; delete {folder}, and it is written again")
        if found % width:
            raise SHARDS_FILE.problem(path, f"{found} bytes, expected a multiple of {width}")


def _check_ranges(folder: Path, manifest: ShardsManifest) -> None:
    offsets = map_array(folder / "offsets.bin", OFFSET_TYPE)
    pairs = map_array(folder / "pairs.bin", PAIR_TYPE)
    tokens = manifest.files["tokens.bin"].bytes // np.dtype(manifest.token_type).itemsize
    texts = max(0, offsets.size - 1)
    if not (offsets.size and offsets[0] == 0 and offsets[-1] == tokens and _ascends(offsets)):
        problem = f"expected offsets that ascend from 0 to the number of tokens, {tokens}"
        raise SHARDS_FILE.problem(folder / "offsets.bin", problem)
    largest = max((int(part.max()) for part in _chunks(pairs)), default=-1)
    if largest >= texts:
        problem = f"a pair has text {largest}, but there are {texts} texts"
        raise SHARDS_FILE.problem(folder / "pairs.bin", problem)
    for table, size in ((manifest.texts, texts), (manifest.pairs, pairs.size // 2)):
        for name, entry in table.items():
            if entry.start + entry.count > size:
                end = f"{entry.start} to {entry.start + entry.count}"
                problem = f"{printable(name)} is {end}, but there are {size} rows"
                raise SHARDS_FILE.problem(folder / MANIFEST, problem)


def _ascends(offsets: IntArray) -> bool:
    return all(
        bool((part[1:] >= part[:-1]).all())
        for part in (offsets[i : i + _CHUNK + 1] for i in range(0, offsets.size, _CHUNK))
    )


def _chunks(values: IntArray) -> list[IntArray]:
    return [values[i : i + _CHUNK] for i in range(0, values.size, _CHUNK)]
