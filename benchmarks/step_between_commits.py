"""The demo's training step at this commit over that of another one, in turns.

Each side is a process of its own that trains the demo's model on the same random batches, a few
steps at a time; the ratio of a block to the two blocks of the other side around it is one
observation. ``cpu_best_over_best`` compares the least processor time of a block, which other work
on the machine disturbs least.

    git worktree add ../before COMMIT
    python benchmarks/step_between_commits.py --before ../before
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from decoding_worker import Worker
from support import write_result

from moesaic.bench.paired_timing import measure_in_turns, ratio_to_baseline

HERE = Path(__file__).parent


def side(checkout: Path, *, threads: int) -> Worker:
    source = checkout / "src"
    return Worker("step_worker.py", str(threads), python=sys.executable, source=source)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the other commit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step_between_commits.json")
    options = parser.parse_args()
    sides = {
        "before": side(options.before, threads=options.threads),
        "now": side(HERE.parent, threads=options.threads),
    }
    runs = {name: partial(each.run, {"steps": options.steps}) for name, each in sides.items()}
    for run in runs.values():
        run()
    for each in sides.values():
        each.cpu.clear()
    times = measure_in_turns(runs, baseline="before", rounds=options.rounds)
    ratio = ratio_to_baseline(times["now"], times["before"])
    result = {
        "question": "seconds of the demo's training step, this commit over another one",
        "ratio": {"median": ratio.median, "middle_half": ratio.quartiles},
        "best_over_best": ratio.best_over_best,
        "cpu_best_over_best": min(sides["now"].cpu) / min(sides["before"].cpu),
        "step_ms": {
            name: 1e3 * min(times[name].seconds.values()) / options.steps for name in sides
        },
        "rounds": options.rounds,
        "steps": options.steps,
        "threads": options.threads,
        "parameters": {name: each.parameters for name, each in sides.items()},
    }
    for each in sides.values():
        each.close()
    write_result(options.out, result)


if __name__ == "__main__":
    main()
