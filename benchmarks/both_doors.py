"""Training from the command line and from Python, in turns, alone and beside a busy program.

    python benchmarks/both_doors.py [ROUNDS]

Three doors: ``moesaic train``; Python with ``import moesaic`` first; Python with ``import torch``
first, where idle threads spin. Prints tokens/s (median of the rounds) and writes
benchmarks/results/both-doors.json.
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

STEPS = 30
SETTINGS = [f"steps={STEPS}", "schedule.warmup=5", "validation.every=1000", "log.every=10"]
IN_PYTHON = """
import sys
for name in sys.argv[1].split(","):
    __import__(name)
import moesaic
moesaic.fit(moesaic.recipe("tiny").override(sys.argv[3:]), sys.argv[2])
"""
DOORS = {
    "command line": [sys.executable, "-m", "moesaic", "train", "tiny", "--out"],
    "Python, moesaic first": [sys.executable, "-c", IN_PYTHON, "moesaic,torch"],
    "Python, torch first": [sys.executable, "-c", IN_PYTHON, "torch"],
}


def tokens_per_second(door: str, folder: Path) -> float:
    """Train once through a door; the median over the logged steps after the first."""
    words = [*DOORS[door], str(folder)]
    for setting in SETTINGS:
        words += ["--set", setting] if door == "command line" else [setting]
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
        speeds: dict[str, list[float]] = {door: [] for door in DOORS}
        with busy_programs(count), tempfile.TemporaryDirectory() as folder:
            for number in range(rounds):
                for door in DOORS:
                    out = Path(folder) / f"{len(speeds[door])}-{door.replace(' ', '-')}"
                    speeds[door].append(tokens_per_second(door, out))
                    print(f"{situation}, round {number + 1}, {door}: {speeds[door][-1]:,.0f}")
        found[situation] = speeds
    for situation, speeds in found.items():
        print(situation)
        for door, values in speeds.items():
            print(f"  {door:24} {statistics.median(values):8,.0f} tokens/s")
    result = {"cores": os.cpu_count(), "load": os.getloadavg(), "tokens_per_s": found}
    path = Path(__file__).parent / "results" / "both-doors.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
