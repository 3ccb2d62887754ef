"""Data rates: how fast shards open, batches are made and tokenizers encode, and in how much memory.

Writes made-up pairs straight into shard files (a corpus of 171 languages would take long to
encode), opens them in a fresh process, and measures; then the same for a real corpus, which is also
encoded:

    python benchmarks/data_rates.py --pairs 100000 12000000 --corpus data/corpora/catalogues-small
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from support import write_result

from moesaic.core.files import write_json
from moesaic.corpus.corpus import Corpus
from moesaic.data.loader import Loader, LoaderConfig
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Denoising, Translation
from moesaic.data.token_shard_writer import file_manifest, write_shards
from moesaic.data.token_shards import FORMAT, MANIFEST, TokenShards
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer

LANGUAGES = tuple(f"x{chr(97 + i // 26)}{chr(97 + i % 26)}_Latn" for i in range(170))
ENGLISH = 472_000  # distinct sources of the software corpus
RESULTS = Path(__file__).parent / "results" / "data_rates.json"


def make_shards(root: Path, *, pairs: int) -> None:
    """Write shards of the size and shape of the 171-language software corpus (97:1 tail)."""
    random = np.random.default_rng(0)
    texts = {"en": ["a b c", "d e f"]}
    tokenizer = train_tokenizer(
        texts, ("eng_Latn", *LANGUAGES), TrainedTokenizer(vocab_size=32_000)
    )
    tokenizer.save(root / "tokenizer.json")
    share = np.exp(-np.arange(len(LANGUAGES)) / 37.0)
    counts = np.maximum(1, share / share.sum() * pairs).astype(int)
    english = min(ENGLISH, pairs)
    held = {"eng_Latn.train": (0, english)}
    table, start = {}, 0
    with (root / "offsets.bin").open("wb") as offsets, (root / "pairs.bin").open("wb") as out:
        lengths, text = [_lengths(random, english)], english
        for code, count in zip(LANGUAGES, counts.tolist(), strict=True):
            lengths.append(_lengths(random, count))
            target = np.arange(text, text + count)
            out.write(np.stack([random.integers(0, english, count), target], 1).astype("<u4"))
            sides = {"source_tokens": 13 * count, "target_tokens": int(lengths[-1].sum())}
            table[f"eng_Latn-{code}.train"] = {"start": start, "count": count} | sides
            held[f"{code}.train"] = (text, count)
            start, text = start + count, text + count
        ends = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(np.concatenate(lengths))])
        offsets.write(ends.astype("<u8"))
    with (root / "tokens.bin").open("wb") as tokens:
        for first in range(0, int(ends[-1]), 1 << 24):
            count = min(1 << 24, int(ends[-1]) - first)
            tokens.write(random.integers(500, 32_000, count).astype("<u2"))
    about = {
        "format": FORMAT,
        "fingerprint": "synthetic",
        "tokenizer": tokenizer.fingerprint,
        "token_type": "<u2",
        "texts": {
            key: {"start": s, "count": n, "tokens": int(ends[s + n] - ends[s])}
            for key, (s, n) in held.items()
        },
        "pairs": table,
        "files": file_manifest(root),
    }
    write_json(root / MANIFEST, about)


def encode_corpus(root: Path, *, path: Path) -> dict[str, float]:
    """Train a tokenizer on a corpus and encode it; return how long each took."""
    corpus, began = Corpus.open(path), time.perf_counter()
    texts = {code: (t.text for t in corpus.iter_texts(code)) for code in corpus.languages}
    config = TrainedTokenizer(vocab_size=16_000)
    tokenizer = train_tokenizer(texts, corpus.languages, config)
    tokenizer.save(root / "tokenizer.json")
    trained = time.perf_counter()
    shards = write_shards(corpus, tokenizer, out=root / "shards")
    seconds = time.perf_counter() - trained
    held = shards.manifest["texts"].values()
    return {
        "pairs": sum(held["count"] for held in shards.manifest["pairs"].values()),
        "tokenizer_s": trained - began,
        "write_s": seconds,
        "tokens_written_per_s": sum(table["tokens"] for table in held) / seconds,
    }


def measure(root: Path, *, tokens: int) -> dict[str, float]:
    """Open shards and draw batches, in a process that did nothing else before."""
    tokenizer = Tokenizer.load(_tokenizer(root))
    before, began = _private_mib(), time.perf_counter()
    shards = TokenShards.open(root)
    opened = time.perf_counter() - began
    tasks = (
        WeightedTask(task=Translation(), weight=0.8),
        WeightedTask(task=Denoising(), weight=0.2),
    )
    config = LoaderConfig(prefetch=0)
    mixture = MixtureConfig(tasks=tasks, temperature=5)
    loader = Loader(shards, tokenizer=tokenizer, mixture=mixture, config=config, seed=1)
    next(loader)
    first = time.perf_counter() - began
    real, area, waits = 0, 0, []
    while real < tokens:
        asked = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - asked)
        real += batch.num_tokens
        area += batch.source.values.numel() + batch.target.values.numel()
    seconds = sum(waits)
    return {
        "open_s": opened,
        "first_batch_s": first,
        "tokens_per_s": real / seconds,
        "padding_percent": 100 * (1 - real / area),
        "median_batch_ms": 1e3 * float(np.median(waits)),
        "window_ms": 1e3 * float(np.max(waits)),
        "anonymous_mib_added": _private_mib() - before,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _lengths(random: np.random.Generator, count: int) -> np.ndarray:
    return random.lognormal(2.3, 0.8, count).clip(1, 250).astype(np.uint64)


def _private_mib() -> float:
    """Memory that only this process holds: mapped file pages belong to the system's cache."""
    text = Path("/proc/self/smaps_rollup").read_text()
    fields = dict(line.split()[:2] for line in text.splitlines()[1:])
    return int(fields["Anonymous:"]) / 1024


def _tokenizer(root: Path) -> Path:
    here = root / "tokenizer.json"
    return here if here.is_file() else root.parent / "tokenizer.json"


def _measured(root: Path, *, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(root), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000, 12_000_000])
    parser.add_argument("--corpus", type=Path, help="a corpus directory to encode and draw from")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens to draw")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, tokens=options.tokens)))
        return
    made, real = [], {}
    for pairs in options.pairs:
        with tempfile.TemporaryDirectory() as folder:
            make_shards(Path(folder), pairs=pairs)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            found = _measured(Path(folder), tokens=options.tokens)
        found.pop("padding_percent")  # made-up lengths of the two sides know nothing of each other
        made.append({"pairs": pairs, "disk_mib": size / 2**20} | found)
    if options.corpus:
        with tempfile.TemporaryDirectory() as folder:
            real = encode_corpus(Path(folder), path=options.corpus)
            real |= _measured(Path(folder) / "shards", tokens=options.tokens)
    write_result(RESULTS, {"made_up": made, "real": real})


if __name__ == "__main__":
    main()
