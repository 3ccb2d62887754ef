"""The gallery: one tiny model per routing rule on real text; does it learn, and who goes where?

python benchmarks/gallery.py                       every rule that is not in the results yet
python benchmarks/gallery.py --only top-2 --again  one rule anew
python benchmarks/gallery.py --draw                write the page and its pictures alone

Rules are rows of ``gallery.yaml``. Results go to ``results/gallery.json`` after each rule, so that
an interrupted gallery goes on; then ``docs/gallery.md`` and ``docs/pictures/gallery/*.svg``.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gallery_page import write_page
from support import stamped

from moesaic.checkpoint.run_directory import RunDir
from moesaic.cli.eval_command import held_out_tests
from moesaic.core.errors import ConfigError, UserError
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.monitor.expert_usage import summarize_load
from moesaic.monitor.metric_writers import read_metrics
from moesaic.monitor.router_health import RouterHealthMonitor
from moesaic.recipes.lookup import find_recipe
from moesaic.serve.score import count_experts
from moesaic.train.routing_hooks import health_check_settings
from moesaic.train.run import Run
from moesaic.train.run_training import train
from moesaic.train.text_data import require_text
from moesaic.train.training_hooks import no_progress

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gallery.json"
SENTENCES = 60  # per language, to see who goes where


def main() -> None:
    options = _options()
    table = yaml.safe_load((HERE / "gallery.yaml").read_text(encoding="utf-8"))
    results = _read()
    for rule in () if options.draw else table["rules"]:
        name = rule["name"]
        if options.only and name not in options.only:
            continue
        changes = [*table["base"]["set"], *rule["set"], f"steps={options.steps}"]
        changes.append(f"data.corpus={{kind: NamedCorpus, name: {options.corpus}}}")
        known = results["rules"].get(name, {})
        if known.get("changes") == changes and not known.get("skipped") and not options.again:
            print(f"{name}: done before")
            continue
        results["rules"][name] = _one(rule, table["base"]["recipe"], changes, options.runs)
        _write(results)
    order = [rule["name"] for rule in table["rules"]]
    shown = {name: results["rules"][name] for name in order if name in results["rules"]}
    print(write_page(results | {"rules": shown}, root=HERE.parent))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One tiny model per routing rule, on real text.")
    parser.add_argument("--only", nargs="*", help="names of rules")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--corpus", default="catalogues-small")
    parser.add_argument("--runs", type=Path, default=Path("build/gallery"))
    parser.add_argument("--again", action="store_true", help="also what is in the results")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    return parser.parse_args()


def _one(rule: dict[str, Any], recipe: str, changes: list[str], runs: Path) -> dict[str, Any]:
    """Train one rule; a rule that this version does not have, or that fails, is a line."""
    row: dict[str, Any] = {"what": rule["what"], "changes": changes}
    began = time.perf_counter()
    try:
        run = find_recipe(recipe, changes=changes).replace(name=rule["name"])
        row |= _trained(run, runs / rule["name"])
    except (ConfigError, UserError) as error:
        row["skipped"] = " ".join(str(error).split())
        print(f"{rule['name']}: skipped, {row['skipped'][:160]}")
        return row
    row["seconds"] = round(time.perf_counter() - began, 1)
    last = row["valid"][-1]
    health = "; ".join(row["findings"]) or "healthy"
    print(f"{rule['name']}: {row['seconds']:.0f} s, validation loss {last[1]:.3f}, {health}")
    return row


def _trained(run: Run, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    result = train(run, out, progress=no_progress)
    tests = held_out_tests(
        run,
        corpus=require_text(run.data, what="the gallery").corpus.open(),
        split="valid",
        limit=SENTENCES,
    )
    counts = count_experts(out, tests=tests)
    rows = list(read_metrics(RunDir(out).metrics))
    layers, size = counts.layers(), count_parameters(run.model)
    setting = health_check_settings(run, languages=counts.languages)
    return {
        "parameters": size.total,
        "active": size.active,
        "steps": result.steps,
        "tokens": result.tokens,
        "train": _curve(rows, "train/loss"),
        "valid": _curve(rows, "valid/loss"),
        "load": {name: round(value, 4) for name, value in summarize_load(layers).items()},
        "findings": [
            f.text for f in RouterHealthMonitor(setting, patience=1).check_interval(layers)
        ],
        "languages": list(counts.languages),
        "layers": {
            layer.layer: {
                "counts": np.asarray(layer.counts).tolist(),
                "null_experts": layer.num_null_experts,
            }
            for layer in layers
        },
    }


def _curve(rows: list[dict[str, Any]], name: str) -> list[list[float]]:
    return [[row["step"], round(row[name], 4)] for row in rows if name in row]


def _read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rules": {}}


def _write(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stamped(results), ensure_ascii=False)
    RESULTS.write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
