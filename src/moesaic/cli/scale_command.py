"""``moesaic scale``: what every rank of a plan would hold and send, before there is any rank."""

import math
import re
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moesaic.cli.shared_options import (
    JsonOption,
    SetOption,
    UseOption,
    command_app,
    import_user_files,
    print_result,
)
from moesaic.core.config import Config
from moesaic.core.errors import UserError
from moesaic.core.units import parse_bytes, show_bytes, show_count, show_seconds
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_count import BatchDims
from moesaic.model.presets import PRESETS, preset
from moesaic.moe.config import MoE
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.communication_volume import communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.memory_estimate import (
    MIXED_PRECISION,
    BytesPerValue,
    EstimateSettings,
    MemoryBudget,
    estimate_memory,
    largest_fitting_model,
)
from moesaic.parallel.parameter_inventory import ParameterInventory, RankParameters
from moesaic.recipes.lookup import RECIPES, find_recipe
from moesaic.train.dry_run import DryRunResult, simulate_step

app = command_app()


class ScaleConfig(Config):
    """A model, how it is laid over ranks, and what trains it."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: Optimizer = AdamW()
    gradient_accumulation_steps: int = 1


@app.command()
def scale(
    which: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|CONFIG|PRESET", help="A recipe, a config.yaml, a run or a preset."
        ),
    ],
    *,
    world_size: Annotated[int, typer.Option(min=1, metavar="N", help="How many ranks.")],
    micro_batch: Annotated[
        str,
        typer.Option(metavar="ROWSxSOURCE+TARGET", help="A micro-batch of one data rank."),
    ] = "8x512+512",
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="The memory of a device, e.g. 80GB.")
    ] = "80GB",
    mixed_precision: Annotated[
        bool,
        typer.Option(
            "--mixed-precision",
            help="Price weights and gradients at 2 bytes with a float32 copy, not 4.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take one step as rank 0 on fake tensors as well.")
    ] = False,
    changes: SetOption = None,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Price a plan: bytes that rank 0 holds, by kind, and sends, by collective and axis.

    Example: [cyan]moesaic scale zcode-m3-64 --world-size 64 --set parallel.plan.expert=64[/]

    Example: [cyan]moesaic scale trillion-384 --world-size 1024 --micro-batch 1x0+6144
    --set parallel.plan.expert=128 --set parallel.plan.tensor=8 --set parallel.plan.zero=3[/]
    """
    import_user_files(files)
    laid, sizes = _read_config(which, changes), _parse_micro_batch(micro_batch)
    storage = MIXED_PRECISION if mixed_precision else BytesPerValue()
    setting = EstimateSettings(laid.parallel, world_size, sizes, storage, laid.optimizer)
    found = estimate_plan(laid, world_size=world_size, sizes=sizes, storage=storage)
    found |= {"name": which, "capacity": _capacity(laid, setting, memory)}
    if dry_run:
        practised = simulate_step(
            laid.model,
            parallel=laid.parallel,
            world_size=world_size,
            sizes=sizes,
            optimizer=laid.optimizer,
        )
        found["dry_run"] = _dry_run_json(practised)
    print_result(found, as_json=as_json, show=lambda console: _show(found, console))


def estimate_plan(
    config: ScaleConfig, *, world_size: int, sizes: BatchDims, storage: BytesPerValue
) -> dict[str, Any]:
    """Return what rank 0 holds and sends, as data."""
    holding = ParameterInventory(config.model).on_rank(config.parallel, world=world_size)
    held = estimate_memory(
        holding, sizes=sizes, bytes_per_value=storage, optimizer=config.optimizer
    )
    lines = communication_volume(
        holding, sizes=sizes, micro_batches=config.gradient_accumulation_steps
    )
    values = sum(math.prod(part.parameter.placement.shape) for part in holding.shards)
    return {
        "world": world_size,
        "short": holding.plan.acronym,
        "parameters": values,
        "grid": _mesh_axes(holding),
        "batch": asdict(sizes) | {"micro_batches": config.gradient_accumulation_steps},
        "storage": storage.to_dict(),
        "bytes": asdict(held) | {"state": held.state, "device": held.device},
        "sent": [asdict(line) for line in lines],
        "sent_total": sum(line.bytes for line in lines),
    }


def _read_config(which: str, changes: list[str] | None) -> ScaleConfig:
    if which in PRESETS and which not in RECIPES:
        laid = ScaleConfig(model=preset(which).config)
        return laid.override(changes) if changes else laid
    run = find_recipe(which, changes=changes or [])
    return ScaleConfig(
        model=run.model,
        parallel=run.parallel,
        optimizer=run.optimizer,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
    )


def _parse_micro_batch(text: str) -> BatchDims:
    found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
    if found is None or "0" in (found[1], found[3]):
        raise UserError(
            f'--micro-batch {text}: expected rows, source and target tokens as "8x512+512" '
            '("8x0+512" for a decoder alone)'
        )
    return BatchDims(*map(int, found.groups()))


def _mesh_axes(holding: RankParameters) -> dict[str, dict[str, int]]:
    numbers = sorted(set(holding.inventory.expert_modules.values()))
    layers = {f"layers of {number} experts": holding.grid(number).axes for number in numbers}
    return {"dense layers": holding.grid().axes} | layers


def _capacity(laid: ScaleConfig, setting: EstimateSettings, memory: str) -> dict[str, Any] | None:
    model = laid.model
    if (
        not isinstance(model.moe, MoE)
        or model.encoder.experts_per_layer
        or model.decoder.experts_per_layer
    ):
        return None
    budget = MemoryBudget(parse_bytes(memory))
    found = largest_fitting_model(model, settings=setting, budget=budget)
    if found is None:
        return {"memory": budget.device, "experts": 0, "parameters": 0}
    return {"memory": budget.device, "experts": found.experts, "parameters": found.parameters}


def _dry_run_json(found: DryRunResult) -> dict[str, Any]:
    return asdict(found) | {"sent_total": sum(line.bytes for line in found.sent)}


def _show(found: dict[str, Any], console: Console) -> None:
    batch = found["batch"]
    console.print(
        f"[bold]{found['name']}[/]: {show_count(found['parameters'])} parameters on "
        f"{found['world']:,} ranks, {found['short']}",
        highlight=False,
    )
    for what, axes in found["grid"].items():
        grid = " x ".join(f"{axis} {size}" for axis, size in axes.items())
        console.print(f"{what}: {grid}", highlight=False)
    console.print(
        f"a step of {batch['micro_batches']} x {batch['rows']} rows of {batch['source']} + "
        f"{batch['target']} tokens for each data rank, routing even\n",
        highlight=False,
    )
    console.print(_memory_table(found))
    console.print(_communication_table(found))
    room = found["capacity"]
    if room is not None:
        console.print(
            f"\nin {show_bytes(room['memory'])} per device this plan holds the same model with up "
            f"to {room['experts']:,} experts per layer: {show_count(room['parameters'])} parameters"
            if room["experts"]
            else f"\n{show_bytes(room['memory'])} per device are too few for this plan",
            highlight=False,
        )
    if "dry_run" in found:
        _show_dry_run(found, console)


def _memory_table(found: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("rank 0 holds")
    table.add_column("", justify="right")
    for name in ("weights", "gradients", "optimizer", "gathered", "activations", "device", "host"):
        label = {"device": "on the device at the peak", "host": "in the host's memory"}
        table.add_row(label.get(name, name), show_bytes(found["bytes"][name]))
    return table


def _communication_table(found: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2), title="\nrank 0 sends per step", title_justify="left")
    for column in ("collective", "axis"):
        table.add_column(column)
    table.add_column("", justify="right")
    for line in found["sent"]:
        table.add_row(line["kind"], line["axis"], show_bytes(line["bytes"]))
    table.add_row("all", "", show_bytes(found["sent_total"]))
    return table


def _show_dry_run(found: dict[str, Any], console: Console) -> None:
    done, said = found["dry_run"], found["bytes"]
    held = all(done[name] == said[name] for name in ("weights", "gradients", "optimizer"))
    console.print(
        f"\nrehearsed in {show_seconds(done['seconds'])}: holds "
        f"{'the same' if held else 'something else'}, sends {show_bytes(done['sent_total'])}, "
        f"{show_bytes(done['peak'])} at most in use before the update",
        highlight=False,
    )
