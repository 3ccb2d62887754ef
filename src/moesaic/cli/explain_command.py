"""``moesaic explain``: parameters, FLOPs and memory of a config, without allocating anything."""

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
    from moesaic.core.units import show_bytes, show_count, show_flops
    from moesaic.model.parameter_flop_count import BatchDims, count_parameters
    from moesaic.model.presets import PRESETS, preset
    from moesaic.planner.cost_settings import CostSettings
    from moesaic.planner.machine import DeviceSize, Machine, device_here, dtype_name, find_machine
    from moesaic.planner.plan_report import streaming_tokens, streaming_words
    from moesaic.planner.plan_space import Degrees
    from moesaic.planner.scale_report import bytes_by_purpose
    from moesaic.planner.step_cost import step_cost
    from moesaic.recipes.lookup import RECIPES, find_recipe
    from moesaic.train.run_checks import check_run

    Explained = tuple[CostSettings, dict[str, Any]]

app = command_app()


@app.command()
def explain(
    which: ModelArgument,
    *,
    changes: SetOption = None,
    config: Annotated[
        bool, typer.Option("--config", help="Print every key of the config too.")
    ] = False,
    machine: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Does a step fit this machine, not the one here?"),
    ] = None,
    files: UseOption = None,
) -> Result:
    """Count parameters (total and active), FLOPs per token and bytes; nothing is allocated.

    Example: [cyan]moesaic explain demo --set model.moe.experts=64[/]

    Example: [cyan]moesaic explain zcode-m3-64[/]
    """
    import_user_files(files)
    is_preset = which in PRESETS and which not in RECIPES
    about = None if machine is None else find_machine(machine)
    device = device_here()
    if about is not None:
        device = DeviceSize(about.name, about.device_memory.value, about.device)
    explained = _explain_preset if is_preset else _explain_run
    settings, found = explained(which, changes, device=device)
    found["streaming"] = _streaming(settings, about)
    peak = found["bytes"]["peak"]
    found["fits"] = {
        "device": device.name,
        "memory": device.memory,
        "fits": peak <= device.memory,
    }
    return Result(found, lambda console: _show(found, console, config=config))


def _explain_preset(name: str, changes: list[str] | None, *, device: DeviceSize) -> Explained:
    model_preset = preset(name)
    model = model_preset.config.override(changes) if changes else model_preset.config
    source = 32 if model.encoder.layers else 0
    settings = CostSettings(
        model=model, sizes=BatchDims(rows=64, source=source), device=device.type
    )
    found = _cost(name, settings)
    counted = found["parameters"]
    published = [asdict(p) | {"counted": counted[p.quantity]} for p in model_preset.published]
    return settings, found | {
        "config": model.to_flat_lines(),
        "source": model_preset.source,
        "guessed": list(model_preset.guessed),
        "published": published,
    }


def _explain_run(which: str, changes: list[str] | None, *, device: DeviceSize) -> Explained:
    run = find_recipe(which, changes=changes or [])
    check_run(run)
    sizes = run.data.batch_dims(run.model)
    settings = CostSettings(
        model=run.model,
        sizes=sizes,
        precision=run.precision,
        optimizer=run.optimizer,
        device=device.type,
        trainable=run.trainable,
    )
    found = _cost(which, settings)
    tokens = run.steps * run.gradient_accumulation_steps * run.data.max_batch_tokens()
    plan = {
        "steps": run.steps,
        "tokens_at_most": tokens,
        "flops_at_most": tokens * found["flops_per_token"]["training"],
    }
    return settings, found | {"config": run.to_flat_lines(), "plan": plan}


def _cost(which: str, settings: CostSettings) -> dict[str, Any]:
    counted, sizes = count_parameters(settings.model), settings.sizes
    held = bytes_by_purpose(step_cost(settings))
    held["peak"] = held.pop("device")
    return {
        "name": which,
        "parameters": {"total": counted.total, "active": counted.active, "by_part": counted.parts},
        "flops_per_token": {
            "forward": counted.flops_per_token(sizes),
            "training": counted.training_flops_per_token(sizes),
        },
        "batch": asdict(sizes),
        "precision": type(settings.precision).__name__,
        "bytes": {name: size for name, size in held.items() if size},
    }


def _streaming(settings: CostSettings, machine: Machine | None) -> dict[str, dict[str, float]]:
    """Return M and M* on one device of a machine file; none where it lacks the dtype."""
    dtype = dtype_name(settings.precision)
    if machine is None or dtype not in machine.products:
        return {}
    one = Degrees(1, 1, 1, 1, 1, 1, settings.sizes.rows, 1)
    return streaming_tokens(settings.model, one, sizes=settings.sizes, machine=machine, dtype=dtype)


def _show(found: dict[str, Any], console: Console, *, config: bool) -> None:
    total, active = found["parameters"]["total"], found["parameters"]["active"]
    console.print(
        styled(
            "[bold]{name}[/]: {total:,} parameters ({total_short}), {active:,} active per token "
            "({active_short}, {share:.0%})\n",
            name=found["name"],
            total=total,
            total_short=show_count(total),
            active=active,
            active_short=show_count(active),
            share=active / total,
        )
    )
    by_part = found["parameters"]["by_part"]
    rows = ((part, f"{size:,}") for part, size in by_part.items())
    print_table(console, ("part", "parameters"), rows)
    batch = found["batch"]
    read = f"{batch['source']} + " if batch["source"] else ""
    print_table(
        console,
        ("bytes", ""),
        ((name, show_bytes(size)) for name, size in found["bytes"].items()),
        title=(
            f"\none training step in {found['precision']}, {batch['rows']} rows of {read}"
            f"{batch['target']} tokens"
        ),
    )
    fits = found["fits"]
    verdict = "fits" if fits["fits"] else "does not fit"
    console.print(f"a step {verdict} {fits['device']}, which has {show_bytes(fits['memory'])}")
    if found["streaming"]:
        console.print(streaming_words(found["streaming"]))
    flops = found["flops_per_token"]
    console.print(
        f"\nFLOPs per token: forward {show_flops(flops['forward'])}, "
        f"training {show_flops(flops['training'])} (matrix products and attention)"
    )
    if "plan" in found:
        plan = found["plan"]
        console.print(
            f"full run: {plan['steps']:,} steps, at most {show_count(plan['tokens_at_most'])} "
            f"tokens, {show_flops(plan['flops_at_most'])}"
        )
    if "source" in found:
        _show_source(found, console)
    if config:
        console.print("\n" + "\n".join(found["config"]))


def _show_source(found: dict[str, Any], console: Console) -> None:
    console.print(f"\nsource: {found['source']}")
    for claim in found["published"]:
        value, counted = claim["value"], claim["counted"]
        console.print(
            f"published {claim['quantity']} {show_count(value)}, counted {show_count(counted)} "
            f"({counted / value - 1:+.1%}); {claim['basis']}: {claim['source']}"
        )
    if found["guessed"]:
        console.print(f"not published, our choice: {', '.join(found['guessed'])}")
