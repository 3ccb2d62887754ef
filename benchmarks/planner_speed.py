"""Processor time of ``moesaic plan`` and ``scale`` at this commit over that of another one.

Each run is a new process, of the two commits in turns. Processor time is what other work on the
machine disturbs least; the imports are part of it.

    git worktree add ../before COMMIT
    python benchmarks/planner_speed.py --before ../before
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

from support import write_result

HERE = Path(__file__).parent


def scale(preset: str, *, world: int, **plan: int) -> list[str]:
    changes = [f"parallel.plan.{axis}={size}" for axis, size in plan.items()]
    sets = [word for change in changes for word in ("--set", change)]
    return ["scale", preset, "--world-size", str(world), *sets]


COMMANDS = {
    "plan mixtral-8x22b": ["plan", "mixtral-8x22b", "--gpus", "8192", "--machine", "h100"],
    "scale zcode-m3-64": scale("zcode-m3-64", world=64, expert=64, zero=2),
    "scale trillion-384": scale("trillion-384", world=8192, expert=128, tensor=8, zero=3),
}


def cpu_seconds(checkout: Path, words: list[str]) -> float:
    """Return the processor time of a command, its imports and its threads included."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve() / "src"),
        "OMP_NUM_THREADS": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "moesaic", *words, "--json"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(words: list[str], *, before: Path, rounds: int) -> dict[str, object]:
    """Run a command of both commits in turns; each round gives one ratio."""
    times = [(cpu_seconds(before, words), cpu_seconds(HERE.parent, words)) for _ in range(rounds)]
    ratios = [now / then for then, now in times]
    return {
        "before_s": round(median(then for then, _ in times), 2),
        "now_s": round(median(now for _, now in times), 2),
        "ratio": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
        "command": " ".join(words),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the other commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "planner_speed.json")
    options = parser.parse_args()
    for words in (["plan", "tiny", "--gpus", "2"],):  # compiles what is imported
        for checkout in (options.before, HERE.parent):
            cpu_seconds(checkout, words)
    result = {
        "question": "processor seconds of a forecast, this commit over another one",
        "rounds": options.rounds,
        "commands": {
            name: compare(words, before=options.before, rounds=options.rounds)
            for name, words in COMMANDS.items()
        },
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
