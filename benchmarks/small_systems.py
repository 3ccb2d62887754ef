"""Small systems against their controls: each variant is trained with several seeds, then measured.

python benchmarks/small_systems.py time-moe                    three seeds of every variant
python benchmarks/small_systems.py vlm2vec --corpus FOLDER     another corpus for the text systems
python benchmarks/small_systems.py --draw                      write the table in the docs alone

Results go to ``results/small_systems.json`` after each seed, so that an interrupted one goes on.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from seed_statistics import by_metric, differences
from small_systems_page import write_page
from small_systems_variants import SYSTEMS, System
from support import stamped

from moesaic.model.parameter_flop_count import count_parameters
from moesaic.train.corpus_source import CorpusFolder
from moesaic.train.run import Run
from moesaic.train.run_training import train
from moesaic.train.text_data import TextData
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook, no_progress

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "small_systems.json"


class _KeepTrainer(Hook):
    def after_step(self, trainer: Trainer, report: StepReport) -> None:  # noqa: ARG002
        self.trainer = trainer


def main() -> None:
    options = _options()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in () if options.draw else options.systems or SYSTEMS:
        _measure(SYSTEMS[name], results.setdefault(name, {}), options)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_page(results, path=HERE.parent / "docs" / "small-systems.md")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Small systems against their controls.")
    parser.add_argument("systems", nargs="*", choices=[[], *SYSTEMS], default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0: those of the recipe")
    parser.add_argument("--corpus", default="", help="a corpus for the systems that read text")
    parser.add_argument("--set", nargs="*", default=[], help="changes of every run, e.g. KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("build/small-systems"))
    parser.add_argument("--draw", action="store_true", help="train nothing")
    return parser.parse_args()


def _measure(system: System, result: dict[str, Any], options: argparse.Namespace) -> None:
    variants = system.variants()
    whole = next(iter(variants.values())).steps  # a variant of one task has its share of them
    variants = {n: _changed(run, options, whole=whole) for n, run in variants.items()}
    known = result.get("seeds", {})
    result |= {"claim": system.claim, "seeds": {}}
    for name, run in variants.items():
        for seed in range(1, options.seeds + 1):
            done = known.get(name, {}).get(str(seed))
            if not done or done["steps"] != run.steps:
                done = _one(system, run.replace(seed=seed, name=f"{name}-{seed}"), options.runs)
            result["seeds"].setdefault(name, {})[str(seed)] = done
    rows = {
        name: [seed["metrics"] for seed in seeds.values()]
        for name, seeds in result["seeds"].items()
    }
    first = next(iter(rows))
    result["variants"] = {name: by_metric(seeds) for name, seeds in rows.items()}
    result["differences"] = {
        f"{first} - {name}": differences(rows[first], seeds)
        for name, seeds in rows.items()
        if name != first and rows[first][0].keys() & seeds[0].keys()
    }
    result |= stamped({"size": {name: _size(run) for name, run in variants.items()}})


def _changed(run: Run, options: argparse.Namespace, *, whole: int) -> Run:
    steps = run.steps * (options.steps or whole) // whole
    run = run.replace(steps=steps).override(options.set)
    if options.corpus and isinstance(run.data, TextData):
        corpus = CorpusFolder(path=options.corpus)
        run = run.replace(data=run.data.replace(corpus=corpus))
    return run


def _one(system: System, run: Run, runs: Path) -> dict[str, Any]:
    """Train one seed and measure it."""
    out, keep, began = runs / run.name, _KeepTrainer(), time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    train(run, out, hooks=[keep], progress=no_progress)
    seconds = time.perf_counter() - began
    keep.trainer.model.eval()
    metrics = system.measure(keep.trainer)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    print(f"{run.name}: {seconds:.0f} s; {shown}", flush=True)
    return {"steps": run.steps, "seconds": round(seconds, 1), "metrics": metrics}


def _size(run: Run) -> dict[str, int]:
    counted = count_parameters(run.model)
    return {"parameters": counted.total, "active": counted.active}


if __name__ == "__main__":
    main()
