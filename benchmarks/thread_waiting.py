"""Training speed by how idle OpenMP threads wait, alone and beside other busy processes.

    python benchmarks/thread_waiting.py [ROUNDS]

Three ways to start the same run, in turns: ``moesaic train`` and Python with ``import moesaic``
first, where idle threads sleep; Python with ``import torch`` first, where they spin. Prints
tokens/s (median of the rounds) and writes benchmarks/results/thread_waiting.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import write_result

STEPS = 30
SETTINGS = [f"steps={STEPS}", "schedule.warmup=5", "validation.every=1000", "log.every=10"]
IN_PYTHON = """
import sys
for name in sys.argv[1].split(","):
    __import__(name)
import moesaic
moesaic.fit(moesaic.recipe("tiny").override(sys.argv[3:]), sys.argv[2])
"""
STARTS = {
    "command line": [sys.executable, "-m", "moesaic", "train", "tiny", "--out"],
    "Python, moesaic first": [sys.executable, "-c", IN_PYTHON, "moesaic,torch"],
    "Python, torch first": [sys.executable, "-c", IN_PYTHON, "torch"],
}


def tokens_per_second(start: str, folder: Path) -> float:
    """Train once, started in one of the ways; the median over the logged steps after the first."""
    words = [*STARTS[start], str(folder)]
    for setting in SETTINGS:
        words += ["--set", setting] if start == "command line" else [setting]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    subprocess.run(words, check=True, capture_output=True, env=environment)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["perf/tokens_per_s"] for row in rows if "perf/tokens_per_s" in row]
    return statistics.median(speeds[1:])


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """``count`` processes that use a core each."""
    spin = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[str, dict[str, list[float]]] = {}
    for situation, count in (("alone", 0), ("beside busy programs", os.cpu_count() or 1)):
        speeds: dict[str, list[float]] = {start: [] for start in STARTS}
        with busy_programs(count), tempfile.TemporaryDirectory() as folder:
            for number in range(rounds):
                for start in STARTS:
                    out = Path(folder) / f"{len(speeds[start])}-{start.replace(' ', '-')}"
                    speeds[start].append(tokens_per_second(start, out))
                    print(f"{situation}, round {number + 1}, {start}: {speeds[start][-1]:,.0f}")
        found[situation] = speeds
    for situation, speeds in found.items():
        print(situation)
        for start, values in speeds.items():
            print(f"  {start:24} {statistics.median(values):8,.0f} tokens/s")
    path = Path(__file__).parent / "results" / "thread_waiting.json"
    write_result(path, {"tokens_per_s": found})


if __name__ == "__main__":
    main()
