"""Tokens per second of decoding: ours, transformers' ``generate`` and CTranslate2, in turns.

Ours is the demo's mixture of experts (2M parameters, 1M active) and a dense model; the others
decode a dense model of the same depth and size. All write equally many tokens (the end is forbidden
until then), greedily and with a beam, in float32. Each side is a process of its own that waits
while the others run; every run is between two of transformers, and its ratio is to their mean, so
other work on the machine hits both. transformers and CTranslate2 are no dependencies of ours, so
give a Python that has them:

    python benchmarks/decoding.py --other-python /path/to/venv/bin/python
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from decoding_shape import request
from decoding_worker import Worker
from support import write_result

from moesaic.bench.paired_timing import RunTimes, measure_in_turns, ratio_to_baseline

HERE = Path(__file__).parent
BASELINE = "transformers dense"
SETTINGS = {"rows 32, greedy": (32, 1), "rows 32, beam 4": (32, 4), "row 1, greedy": (1, 1)}


def start(options: argparse.Namespace) -> dict[str, Worker]:
    threads = str(options.threads)
    source = HERE.parent / "src"
    ours = partial(Worker, "decoding_ours.py", python=sys.executable)
    others = partial(Worker, "decoding_others.py", python=options.other_python)
    sides = {
        BASELINE: others("transformers", threads, source=source),
        "moesaic experts": ours("moe", threads, source=source),
        "moesaic dense": ours("dense", threads, source=source),
        "CTranslate2 dense": others("ctranslate2", threads, source=source),
    }
    if options.before:
        before = partial(Worker, "decoding_before.py", python=sys.executable)
        sides["before experts"] = before("moe", threads, source=options.before / "src")
        sides["before dense"] = before("dense", threads, source=options.before / "src")
    return sides


def speed(times: RunTimes, baseline: RunTimes, *, tokens: int) -> dict[str, Any]:
    """Return tokens per second, and how many times those of the baseline."""
    ratio = ratio_to_baseline(times, baseline)
    return {
        "tokens_per_s": round(tokens / statistics.median(times.seconds.values())),
        "of_transformers": round(1 / ratio.median, 3),
        "middle_half": [round(1 / quartile, 3) for quartile in reversed(ratio.quartiles)],
    }


def compare(sides: dict[str, Worker], *, rows: int, beam: int, options: Any) -> dict[str, Any]:
    asked = request(rows, beam=beam, tokens=options.tokens)
    runs = {name: partial(worker.run, asked) for name, worker in sides.items()}
    for run in runs.values():
        run()
    for worker in sides.values():
        worker.cpu.clear()
    times = measure_in_turns(runs, baseline=BASELINE, rounds=options.rounds)
    found = {
        name: speed(times[name], times[BASELINE], tokens=rows * options.tokens) for name in sides
    }
    least = min(sides[BASELINE].cpu)
    for name, worker in sides.items():
        found[name]["cpu_best_over_best"] = round(least / min(worker.cpu), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other-python", required=True, help="has transformers and ctranslate2")
    parser.add_argument("--before", type=Path, help="a checkout of an older commit, to compare")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of the name of a setting")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "decoding.json")
    options = parser.parse_args()
    sides = start(options)
    settings = {name: pair for name, pair in SETTINGS.items() if options.only in name}
    found = {
        name: compare(sides, rows=rows, beam=beam, options=options)
        for name, (rows, beam) in settings.items()
    }
    result = {
        "question": "tokens/s in decoding, and how many times those of transformers",
        "tokens": options.tokens,
        "threads": options.threads,
        "rounds": options.rounds,
        "parameters": {name: worker.parameters for name, worker in sides.items()},
        "speed": found,
    }
    for worker in sides.values():
        worker.close()
    write_result(options.out, result)


if __name__ == "__main__":
    main()
