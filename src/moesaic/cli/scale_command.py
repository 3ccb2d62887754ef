"""``moesaic scale``: estimate memory and communication of a rank under a parallel plan."""

import re
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    ModelArgument,
    Result,
    SetOption,
    UseOption,
    command_app,
    print_table,
)
from moesaic.cli.styled_text import styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.core.errors import UserError
    from moesaic.core.units import parse_bytes, show_bytes, show_count, show_seconds
    from moesaic.model.parameter_flop_count import BatchDims
    from moesaic.model.presets import PRESETS, preset
    from moesaic.moe.config import MoE
    from moesaic.planner.capacity import MemoryBudget, largest_fitting_model
    from moesaic.planner.cost_settings import CostSettings
    from moesaic.planner.dry_run import simulate_step
    from moesaic.planner.scale_report import ScaleConfig, scale_report
    from moesaic.recipes.lookup import RECIPES, find_recipe

app = command_app()


@app.command()
def scale(
    which: ModelArgument,
    *,
    world_size: Annotated[
        int, typer.Option(min=1, max=2**24, metavar="N", help="Number of ranks.")
    ],
    micro_batch: Annotated[
        str,
        typer.Option(
            metavar="ROWSxSOURCE+TARGET", help="The micro-batch of one data-parallel rank."
        ),
    ] = "8x512+512",
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of a device, e.g. 80GB.")
    ] = "80GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also simulate one step of rank 0 with fake tensors.")
    ] = False,
    changes: SetOption = None,
    files: UseOption = None,
) -> Result:
    """Compute the bytes that rank 0 holds, by kind, and sends, by collective and mesh axis.

    Example: [cyan]moesaic scale zcode-m3-64 --world-size 64 --set parallel.plan.expert=64[/]

    Example: [cyan]moesaic scale trillion-384 --world-size 1024 --micro-batch 1x0+6144
    --set parallel.plan.expert=128 --set parallel.plan.tensor=8 --set parallel.plan.zero=3[/]
    """
    import_user_files(files)
    config, sizes = _read_config(which, changes), _parse_micro_batch(micro_batch)
    settings = config.cost_settings(world=world_size, sizes=sizes)
    found = scale_report(settings) | {"name": which, "capacity": _capacity(settings, memory)}
    if dry_run:
        step = simulate_step(settings)
        found["dry_run"] = asdict(step) | {"sent_total": sum(line.bytes for line in step.sent)}
    return Result(found, lambda console: _show(found, console))


def _read_config(which: str, changes: list[str] | None) -> ScaleConfig:
    if which in PRESETS and which not in RECIPES:
        config = ScaleConfig(model=preset(which).config)
        return config.override(changes) if changes else config
    run = find_recipe(which, changes=changes or [])
    return ScaleConfig(
        model=run.model,
        parallel=run.parallel,
        precision=run.precision,
        optimizer=run.optimizer,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        trainable=run.trainable,
    )


def _parse_micro_batch(text: str) -> BatchDims:
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})\+(\d{1,9})", text, flags=re.ASCII)
    if found is None or not int(found[1]) or not int(found[3]):
        raise UserError(
            f'--micro-batch {text}: expected rows, source and target tokens as "8x512+512" '
            '("8x0+512" for a decoder alone)'
        )
    return BatchDims(*map(int, found.groups()))


def _capacity(settings: CostSettings, memory: str) -> dict[str, Any] | None:
    """Return the largest number of experts that fits, if all MoE layers have the same number."""
    model = settings.model
    varied = model.encoder.experts_per_layer or model.decoder.experts_per_layer
    if not isinstance(model.moe, MoE) or varied:
        return None
    budget = MemoryBudget(parse_bytes(memory))
    largest = largest_fitting_model(settings, budget=budget)
    if largest is None:
        return {"memory": budget.device, "experts": 0, "parameters": 0}
    return {"memory": budget.device, "experts": largest.experts, "parameters": largest.parameters}


def _show(found: dict[str, Any], console: Console) -> None:
    batch = found["batch"]
    console.print(
        styled(
            "[bold]{name}[/]: {parameters} parameters on {ranks:,} ranks, {plan}",
            name=found["name"],
            parameters=show_count(found["parameters"]),
            ranks=found["world"],
            plan=found["plan"],
        )
    )
    for layers, axes in found["mesh"].items():
        grid = " x ".join(f"{axis} {size}" for axis, size in axes.items())
        console.print(f"{layers}: {grid}")
    console.print(
        f"a step of {batch['micro_batches']} x {batch['rows']} rows of {batch['source']} + "
        f"{batch['target']} tokens per data-parallel rank, with even routing\n"
    )
    labels: dict[str, str] = {
        "states": "optimizer states",
        "device": "device memory at the peak",
        "host": "host memory",
    }
    rows = [(labels.get(kind) or kind, show_bytes(size)) for kind, size in found["bytes"].items()]
    print_table(console, ("rank 0 holds", ""), rows)
    sent = [(line["kind"], line["axis"], show_bytes(line["bytes"])) for line in found["sent"]]
    sent.append(("all", "", show_bytes(found["sent_total"])))
    columns = ("collective", "axis", "")
    if found["bubble"]:
        console.print(f"\nthe pipeline waits {found['bubble']:.0%} of the time")
    print_table(console, columns, sent, title="\nrank 0 sends per step", align="llr")
    capacity = found["capacity"]
    if capacity is not None:
        memory = show_bytes(capacity["memory"])
        console.print(
            f"\nwith {memory} per device this plan fits the same model with up to "
            f"{capacity['experts']:,} experts per layer: {show_count(capacity['parameters'])} "
            "parameters"
            if capacity["experts"]
            else f"\n{memory} per device are too few for this plan"
        )
    if "dry_run" in found:
        _show_dry_run(found["dry_run"], estimate=found["bytes"], console=console)


def _show_dry_run(step: dict[str, Any], *, estimate: dict[str, Any], console: Console) -> None:
    kinds = {"weights": "weights", "gradients": "gradients", "optimizer": "states"}
    equal = all(step[kind] == estimate[other] for kind, other in kinds.items())
    console.print(
        f"\ndry run in {show_seconds(step['seconds'])}: state "
        f"{'as estimated' if equal else 'differs from the estimate'}; before the update: sends "
        f"{show_bytes(step['sent_total'])}, peak {show_bytes(step['peak'])}"
    )
