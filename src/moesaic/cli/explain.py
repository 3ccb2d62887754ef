"""``moesaic explain``: what a recipe will cost, before anything runs or is allocated."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moesaic.cli.common import Json, Set, answer, verb_app
from moesaic.core.units import show_bytes, show_count, show_flops
from moesaic.model.config import TransformerConfig
from moesaic.model.count import Count, Sizes, count
from moesaic.model.footprint import footprint
from moesaic.model.presets import PRESETS, Published, published
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.recipes.find import RECIPES, find

app = verb_app()


@app.command()
def explain(
    which: Annotated[
        str, typer.Argument(metavar="RECIPE|CONFIG|PRESET", help="A recipe, a config.yaml, a run or a preset.")
    ],
    *,
    changes: Set = None,
    config: Annotated[bool, typer.Option("--config", help="Print every key of the config too.")] = False,
    as_json: Json = False,
) -> None:
    """Count parameters (total and active), FLOPs per token and bytes; nothing is allocated.

    Example: [cyan]moesaic explain demo --set model.moe.experts=64[/]

    Example: [cyan]moesaic explain zcode-m3-64[/]
    """
    if which in PRESETS and which not in RECIPES:
        model: TransformerConfig = PRESETS(which)
        model = model.override(changes) if changes else model
        sizes, optimizer, lines = Sizes(rows=64), AdamW(), model.flat()
        plan: dict[str, Any] = {}
    else:
        run = find(which, changes=changes or [])
        model, optimizer, lines = run.model, run.optimizer, run.flat()
        sizes = _sizes(run.loader.batch_tokens, run.loader.max_source, run.loader.max_target, model)
        plan = {"steps": run.steps, "accumulate": run.accumulate, "batch_tokens": run.loader.batch_tokens}
    counted = count(model)
    found = _found(which, counted, sizes=sizes, optimizer=optimizer) | {"plan": plan, "config": lines}
    if plan:
        tokens = plan["steps"] * plan["accumulate"] * plan["batch_tokens"]
        found["run"] = {"tokens_at_most": tokens, "flops": tokens * found["flops_per_token"]["training"]}
    claim = published(which)
    if claim:
        found["published"] = asdict(claim)
    answer(found, as_json=as_json, show=lambda console: _show(found, claim, console, config=config))


def _sizes(tokens: int, source: int, target: int, model: TransformerConfig) -> Sizes:
    """A full batch of texts half as long as the longest allowed."""
    source = max(1, source // 2) if model.encoder.layers else 0
    target = max(1, target // 2)
    return Sizes(rows=max(1, tokens // (source + target)), source=source, target=target)


def _found(which: str, counted: Count, *, sizes: Sizes, optimizer: Optimizer) -> dict[str, Any]:
    memory = footprint(counted.config, sizes=sizes, optimizer=optimizer)
    return {
        "name": which,
        "parameters": {"total": counted.total, "active": counted.active, "by_part": counted.parts},
        "flops_per_token": {
            "forward": counted.flops_per_token(sizes),
            "training": counted.training_flops_per_token(sizes),
        },
        "batch": asdict(sizes),
        "bytes": asdict(memory) | {"total": memory.total},
    }


def _show(found: dict[str, Any], claim: Published | None, console: Console, *, config: bool) -> None:
    total, active = found["parameters"]["total"], found["parameters"]["active"]
    console.print(
        f"[bold]{found['name']}[/]: {total:,} parameters ({show_count(total)}), "
        f"{active:,} active per token ({show_count(active)}, {active / total:.0%})\n",
        highlight=False,
    )
    parts = Table(box=None, padding=(0, 2))
    parts.add_column("part")
    parts.add_column("parameters", justify="right")
    for part, size in found["parameters"]["by_part"].items():
        parts.add_row(part, f"{size:,}")
    console.print(parts)
    batch = found["batch"]
    shape = f"{batch['rows']} rows of {batch['source']} + {batch['target']} tokens"
    memory = Table(box=None, padding=(0, 2), title=f"\none training step in float32, {shape}", title_justify="left")
    memory.add_column("bytes")
    memory.add_column("", justify="right")
    for name, size in found["bytes"].items():
        memory.add_row(name, show_bytes(size))
    console.print(memory)
    flops = found["flops_per_token"]
    console.print(
        f"\nFLOPs per token: forward {show_flops(flops['forward'])}, "
        f"training {show_flops(flops['training'])} (matrix products and attention)",
        highlight=False,
    )
    if "run" in found:
        plan, run = found["plan"], found["run"]
        console.print(
            f"the whole run: {plan['steps']:,} steps, at most {show_count(run['tokens_at_most'])} tokens, "
            f"{show_flops(run['flops'])}",
            highlight=False,
        )
    if claim:
        console.print(f"\npublished: {claim.text(counted=total)}", highlight=False)
    if config:
        console.print("\n" + "\n".join(found["config"]), highlight=False, markup=False)
