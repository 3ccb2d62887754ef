"""Hybrids of attention and recurrences beside attention alone: held-out loss, bytes of decoding.

python benchmarks/hybrids.py                              every pair, three seeds
python benchmarks/hybrids.py --only hunyuan-hybrid --seeds 3

A recipe and its control (``attention_alone``) have the same data, steps, experts and, within one
head width, parameters; seeds are paired. ``spikingbrain-inter-spikes`` is the recipe with integer
spikes, and its control is the recipe itself. Results go to ``results/hybrids.json`` after each run,
so that an interrupted benchmark goes on.
"""

import argparse
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from support import stamped
from torch import nn

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.shapes import Tensor
from moesaic.data.batch import InputRows
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.transformer import Transformer
from moesaic.monitor.metric_writers import read_metrics
from moesaic.nn.spike_coding import (
    BitwiseSpikes,
    IntegerSpikes,
    SpikeCounts,
    SpikingNorm,
    TernarySpikes,
)
from moesaic.recipes.lookup import find_recipe
from moesaic.train.run import Run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress

RESULTS = Path(__file__).parent / "results" / "hybrids.json"
LENGTHS = (64, 512, 4096)
STUDENT_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, n - 1 degrees of freedom
SPIKES = "spikingbrain-inter-spikes"
RECIPES = ("hunyuan-hybrid", "spikingbrain-inter", "spikingbrain-intra", SPIKES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hybrids beside attention alone.")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=Path, default=Path("build/hybrids"))
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}, "pairs": {}}
    for seed in range(options.seeds):
        for name in options.only:
            for run in _pair(name):
                changes = [f"steps={options.steps}", f"seed={seed}"]
                changes += [
                    f"{part}.every={options.steps}" for part in ("validation", "checkpoint")
                ]
                _train_once(run.override(changes), options.runs, results)
    for name in options.only:
        hybrid, control = (results["runs"][run.name] for run in _pair(name))
        results["pairs"][name] = _compare(hybrid, control)
        print(name, results["pairs"][name])
    _write(results)


def _pair(name: str) -> tuple[Run, Run]:
    """Return a recipe and its control."""
    if name != SPIKES:
        run = find_recipe(name)
        return run, attention_alone(run)
    plain = find_recipe("spikingbrain-inter")
    model = plain.model.replace(activation_coding=IntegerSpikes(k=1.0))
    return plain.replace(name=SPIKES, model=model), plain


def attention_alone(run: Run) -> Run:
    """Return the control of a hybrid: attention in every branch, with as many parameters.

    A branch of the hybrid is one attention, also where it has two mixers in parallel. The head
    width is the one (of even ones) with which the number of parameters is nearest.
    """
    decoder = run.model.decoder
    blocks = [re.sub(r"\w+( \| \w+)*", "attention", block) for block in decoder.pattern.split(",")]
    plain = run.model.replace(mixers={}, decoder=decoder.replace(pattern=",".join(blocks)))
    wanted = count_parameters(run.model).total

    def distance(width: int) -> int:
        return abs(count_parameters(_with_head_dim(plain, width)).total - wanted)

    width = min(range(2, 2 * run.model.dim, 2), key=distance)
    return run.replace(name=f"{run.name}-attention", model=_with_head_dim(plain, width))


def _with_head_dim(model: ModelConfig, width: int) -> ModelConfig:
    return model.replace(attention=model.attention.replace(head_dim=width))


def _train_once(run: Run, runs: Path, results: dict[str, Any]) -> None:
    row = results["runs"].setdefault(run.name, _description(run))
    if str(run.seed) in row["loss"]:
        return
    out = runs / run.name
    shutil.rmtree(out, ignore_errors=True)
    train(run, out, progress=no_progress)
    losses = [
        point["valid/loss"] for point in read_metrics(RunDir(out).metrics) if "valid/loss" in point
    ]
    row["loss"][str(run.seed)] = round(losses[-1], 4)
    row["steps"] = run.steps
    if isinstance(run.model.activation_coding, IntegerSpikes):
        row["spikes"] = _spikes(run)
    _write(results)
    print(run.name, run.seed, row["loss"][str(run.seed)])


def _description(run: Run) -> dict[str, Any]:
    count = count_parameters(run.model)
    return {
        "parameters": count.total,
        "active": count.active,
        "pattern": run.model.decoder.pattern,
        "state_bytes": {length: _state_bytes(run, length) for length in LENGTHS},
        "loss": {},
    }


@torch.no_grad()
def _state_bytes(run: Run, length: int) -> int:
    """Return what the mixers of all blocks keep of one row of ``length`` tokens."""
    torch.manual_seed(0)
    model = Transformer(run.model).eval()
    cache = model.init_cache(None, rows=1)
    model.step(InputRows.full(torch.randint(5, 500, (1, length))), cache)
    return sum(state.nbytes for block in cache.mixers for state in block)


@torch.no_grad()
def _spikes(run: Run) -> dict[str, float]:
    """Return statistics of the integers that the branches of a new model read of random tokens."""
    torch.manual_seed(0)
    model = Transformer(run.model).eval()
    found: list[SpikeCounts] = []

    def record(spiking: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(spiking, SpikingNorm)
        found.append(spiking.counts(inputs[0]))

    for module in model.modules():
        if isinstance(module, SpikingNorm):
            module.register_forward_hook(record)
    cache = model.init_cache(None, rows=1)
    model.step(InputRows.full(torch.randint(5, 500, (1, 256))), cache)
    count = torch.cat([counts.count for counts in found])
    size = count.abs()
    bits = BitwiseSpikes().events(count)
    return {
        "silent": round((size == 0).float().mean().item(), 4),
        "at_most_7": round((size <= 7).float().mean().item(), 4),
        "mean_count": round(size.float().mean().item(), 4),
        "events_per_channel_bitwise": round(bits.event.abs().sum(0).float().mean().item(), 4),
        "sparsity_bitwise": round(bits.sparsity(), 4),
        "sparsity_ternary": round(TernarySpikes().events(count).sparsity(), 4),
    }


def _compare(hybrid: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """Return mean losses and the difference of pairs of a seed, with a 95 % interval."""
    seeds = sorted(set(hybrid["loss"]) & set(control["loss"]))
    gaps = [hybrid["loss"][seed] - control["loss"][seed] for seed in seeds]
    half = STUDENT_95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    mean = statistics.mean(gaps)
    return {
        "seeds": len(seeds),
        "loss": round(statistics.mean(hybrid["loss"][seed] for seed in seeds), 4),
        "control": round(statistics.mean(control["loss"][seed] for seed in seeds), 4),
        "difference": round(mean, 4),
        "interval": [round(mean - half, 4), round(mean + half, 4)],
        "parameters": [hybrid["parameters"], control["parameters"]],
    }


def _write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(stamped(results), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
