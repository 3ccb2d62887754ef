"""``moesaic plan``: the fastest plans of a model on a cluster, before anything runs."""

import re
from functools import partial
from pathlib import Path
from textwrap import fill
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
    show_progress,
)
from moesaic.cli.styled_text import styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.core.errors import UserError
    from moesaic.core.files import os_errors_named
    from moesaic.core.units import counted, parse_bytes, show_bytes, show_count, show_seconds
    from moesaic.model.parameter_flop_count import count_parameters
    from moesaic.model.presets import PRESETS, preset
    from moesaic.monitor.chrome_trace import write_chrome_trace
    from moesaic.planner.budget_proposal import BudgetProposal, propose_for_budget
    from moesaic.planner.cost_entries import TIER_WORDS
    from moesaic.planner.largest_model import largest_models
    from moesaic.planner.machine import find_machine
    from moesaic.planner.plan_report import (
        PlanReport,
        PlanRequest,
        find_plans,
        machine_limits,
        plan_words,
        streaming_words,
    )
    from moesaic.planner.plan_space import PlanSpace
    from moesaic.planner.timeline import predicted_spans
    from moesaic.recipes.lookup import RECIPES, find_recipe

PLAN_WIDTH = 58  # of the column of plans: the table has about 100 columns

app = command_app()
BudgetOption = Annotated[
    float | None,
    typer.Option(
        metavar="FLOPS", help="Instead, without a recipe: sizes and tokens for a training budget."
    ),
]
TimelineOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the step of the fastest plan as a Chrome trace."),
]
MEMORY_HELP = "Memory of a device, e.g. 40GiB; by default the machine's."


@app.command()
def plan(
    which: ModelArgument = "",
    *,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=2**20, metavar="N", help="Number of devices.")
    ] = None,
    machine: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A machine by name, or a machine file.")
    ] = "h100",
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help=MEMORY_HELP)] = None,
    host: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory of a node, e.g. 1TiB.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="ROWSxSOURCE+TARGET", help="The rows of one step over all devices."),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="Price a run of so many tokens.")
    ] = None,
    max_params: Annotated[
        bool,
        typer.Option("--max-params", help="Instead: the largest model of each combination."),
    ] = False,
    budget: BudgetOption = None,
    timeline: TimelineOption = None,
    keep: Annotated[int, typer.Option(min=1, max=50, help="How many plans to print.")] = 5,
    changes: SetOption = None,
    files: UseOption = None,
) -> Result:
    """Search all parallel plans, ZeRO stages, memory tiers, checkpointing and micro-batches.

    Example: [cyan]moesaic plan mixtral-8x22b --gpus 128 --machine h100[/]

    Example: [cyan]moesaic plan zcode-m3-64 --gpus 512 --machine a100-40 --host 1TiB --max-params[/]

    Example: [cyan]moesaic plan --budget 1e21[/]
    """
    if budget is not None:
        proposal = propose_for_budget(budget)
        return Result(proposal.to_dict(), partial(_show_proposal, proposal))
    import_user_files(files)
    gpus = _require_both(which, gpus)
    request = _read_request(which, gpus=gpus, batch=batch, changes=changes)
    found = find_machine(machine)
    sizes = {name: parse_bytes(s) for name, s in (("memory", memory), ("host", host)) if s}
    limits = machine_limits(found, ranks=gpus, **sizes)
    if max_params:
        table = largest_models(request, machine=found, limits=limits)
        return Result(table, lambda console: _show_largest(table, console))
    show_progress(f"{request.name}: one step of one row is measured on fake tensors, then searched")
    report = find_plans(request, machine=found, limits=limits, keep=keep)
    if timeline is not None:
        _write_timeline(report, timeline)
    result = _to_json(report, tokens=tokens)
    return Result(result, lambda console: _show(report, result, console))


def _require_both(which: str, gpus: int | None) -> int:
    if not which or gpus is None:
        missing = "--gpus N" if which else "the recipe, config or preset"
        raise UserError(
            f"{missing} is missing: moesaic plan RECIPE --gpus N, or moesaic plan --budget FLOPS"
        )
    return gpus


def _write_timeline(report: PlanReport, path: Path) -> None:
    name = f"{report.request.name} on {report.machine.name}, predicted"
    with os_errors_named(path, action="the timeline cannot be written"):
        write_chrome_trace(path, predicted_spans(report.best[0].time), process=name)


def _read_request(
    which: str, *, gpus: int, batch: str | None, changes: list[str] | None
) -> PlanRequest:
    if which in PRESETS and which not in RECIPES:
        model = preset(which).config
        given = batch or f"{max(1024, gpus)}x" + ("512+512" if model.encoder.layers else "0+4096")
        request = PlanRequest(name=which, model=model, space=_space(gpus, given))
        return request.override(changes) if changes else request
    run = find_recipe(which, changes=changes or [])
    sizes = run.data.batch_dims(run.model)
    rows = max(gpus, sizes.rows * run.gradient_accumulation_steps)
    return PlanRequest(
        name=which,
        model=run.model,
        space=_space(gpus, batch or f"{rows}x{sizes.source}+{sizes.target}"),
        parallel=run.parallel,
        optimizer=run.optimizer,
        precision=run.precision,
        trainable=run.trainable,
    )


def _space(gpus: int, batch: str) -> PlanSpace:
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})\+(\d{1,9})", batch, flags=re.ASCII)
    if found is None or not int(found[1]) or not int(found[3]):
        raise UserError(
            f'--batch {batch}: expected rows, source and target tokens as "1024x512+512" '
            '("1024x0+4096" for a decoder alone)'
        )
    rows, source, target = map(int, found.groups())
    return PlanSpace(ranks=gpus, rows=rows, source=source, target=target)


def _to_json(report: PlanReport, *, tokens: float | None) -> dict[str, Any]:
    certificate = report.certificate
    return {
        "name": report.request.name,
        "machine": report.machine.name,
        "parameters": count_parameters(report.request.model).total,
        "limits": dict(report.limits.bytes),
        "plans": report.rows(token_budget=tokens),
        "certificate": {
            "plans": certificate.plans,
            "degrees": certificate.degrees,
            "opened": certificate.opened,
            "evaluations": certificate.evaluations,
            "next_bound_s": certificate.next_bound,
            "holds": certificate.holds,
        },
    }


def _show(report: PlanReport, result: dict[str, Any], console: Console) -> None:
    first = result["plans"][0]
    console.print(
        styled(
            "[bold]{name}[/]: {parameters} parameters, {devices} of {machine}\n",
            name=result["name"],
            parameters=show_count(result["parameters"]),
            devices=counted(report.request.space.ranks, "device"),
            machine=result["machine"],
        )
    )
    tiers = [tier for tier in TIER_WORDS if any(tier in found.by_tier for found in report.best)]
    rows = [
        (
            show_seconds(row["seconds"]["step"]),
            show_count(row["tokens_per_second"]),
            f"{row['mfu_active']:.1%}",
            *(show_bytes(found.by_tier.get(tier, 0)) for tier in tiers),
            styled(
                "{plan}\n[dim]{why}[/]",
                plan=fill(plan_words(found.choice), PLAN_WIDTH),
                why=row.get("slower", "the fastest"),
            ),
        )
        for found, row in zip(report.best, result["plans"], strict=True)
    ]
    columns = ("step", "tokens/s", "MFU", *(TIER_WORDS[tier] for tier in tiers), "plan")
    print_table(console, columns, rows, align="r" * (len(columns) - 1) + "l")
    _show_seconds(first["seconds"], console)
    console.print(f"\n{streaming_words(first['streaming'])}")
    if "budget" in first:
        budget = first["budget"]
        money = f", {budget['money']:,.0f} in money" if "money" in budget else ""
        console.print(
            f"\n{show_count(budget['tokens'])} tokens: {budget['hours']:,.1f} hours, "
            f"{budget['device_hours']:,.0f} device hours{money}"
        )
    found = report.certificate
    console.print(
        f"\nnone of the {found.plans:,} plans is forecast to be faster: "
        f"{found.opened:,} of {counted(found.degrees, 'set')} of degrees were searched,\n"
        "the others cannot be as fast as the plans above"
    )


def _show_seconds(seconds: dict[str, Any], console: Console) -> None:
    parts = {**seconds["compute"], **seconds["communication"], **seconds["transfers"]}
    parts |= {"update": seconds["update"], "bubble": seconds["bubble"]}
    rows = [
        (name, show_seconds(value), f"{value / seconds['step']:.1%}")
        for name, value in sorted(parts.items(), key=lambda part: -part[1])
        if value
    ]
    print_table(console, ("waits for", "", ""), rows, title="\na step of the fastest plan")


def _show_largest(table: dict[str, Any], console: Console) -> None:
    rows = [
        (
            row["combination"],
            show_count(row["parameters"]) if row["parameters"] else "does not fit",
            f"{row['experts']:,}" if row["experts"] else "",
            fill(row["plan"], 44),
            fill(row["paper"], 32),
        )
        for row in table["rows"]
    ]
    columns = ("", "parameters", "experts", "plan", "2109.10465")
    print_table(console, columns, rows, align="lrrll")
    console.print("\n" + fill(table["note"], 100))


def _show_proposal(proposal: BudgetProposal, console: Console) -> None:
    rows = [
        (
            value.name,
            show_count(value.value) if 1e4 <= value.value < 1e15 else f"{value.value:.4g}",
            value.unit,
            value.paper,
        )
        for value in proposal.values
    ]
    title = styled("for {flops:.3g} training FLOPs", flops=proposal.flops)
    print_table(console, ("", "value", "unit", "paper"), rows, title=title)
    for paper, fitted in dict.fromkeys((v.paper, v.fitted_on) for v in proposal.values):
        console.print(styled("[dim]{paper} was fitted on {fitted}[/]", paper=paper, fitted=fitted))
