"""``moesaic verify``: train a config under every parallel plan and compare with one process."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    RecipeArgument,
    Result,
    SetOption,
    UseOption,
    command_app,
    show_progress,
    stderr,
)
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.core.errors import UserError
    from moesaic.core.units import show_seconds
    from moesaic.parallel.config import ParallelConfig
    from moesaic.recipes.lookup import find_recipe
    from moesaic.verify.compare_plans import (
        PlanResult,
        VerifySetup,
        compare_plans,
        configured_plan,
        make_setup,
        plans_up_to,
        rejection_lines,
        run_reference,
        summarize,
        time_left,
        time_of_plans,
        to_markdown,
        tolerances_text,
        unequal_plans,
    )
    from moesaic.verify.shrink_config import shrink_config

app = command_app()


@app.command()
def verify(
    which: RecipeArgument,
    *,
    world_size: Annotated[
        int,
        typer.Option(min=2, max=64, help="Most ranks; its divisors are tried too."),
    ] = 8,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps under each plan.")] = 3,
    choice: Annotated[
        Literal["pairs", "all", "config"],
        typer.Option(
            "--plans",
            help="All plans, enough that any two degrees occur together, or that of the config.",
        ),
    ] = "pairs",
    changes: SetOption = None,
    timeout_s: Annotated[
        float, typer.Option(min=1, max=10**6, help="Seconds that one plan may take.")
    ] = 120,
    out: Annotated[Path | None, typer.Option(help="Write the matrix there, as Markdown.")] = None,
    files: UseOption = None,
) -> Result:
    """Train a small copy of a config under every plan, and compare with one process.

    Widths and the vocabulary are reduced and the text is synthetic; layers, routing, heads, experts
    per token and the optimizer are those of the config. Exit code 1 if any plan differs.

    Example: [cyan]moesaic verify tiny --world-size 4[/]

    The plan of the config: [cyan]moesaic verify mine.yaml --world-size 8 --plans config[/]
    """
    import_user_files(files)
    shrunk = shrink_config(find_recipe(which, changes=changes or []))
    setup = make_setup(shrunk.run, steps=steps, timeout_s=timeout_s)
    found = (
        configured_plan(shrunk.run, world_size=world_size)
        if choice == "config"
        else plans_up_to(shrunk.run, world_size=world_size)
    )
    chosen = found.pairwise_cover() if choice == "pairs" else found
    if not chosen.valid:
        raise UserError(
            f"no plan of {world_size} ranks fits: {'; '.join(rejection_lines(found.rejected))}"
        )
    show_progress(f"reduced: {'; '.join(shrunk.changes)}")
    verdicts = _compare(setup, plans=chosen.valid)
    text = _to_markdown(verdicts, setup=setup, rejected=list(rejection_lines(found.rejected)))
    if out is not None:
        out.write_text(text, encoding="utf-8")
    value = _to_json(verdicts) | {"changes": shrunk.changes, "plans that fit": len(found.valid)}
    exit_code = int(bool(unequal_plans(verdicts)))
    return Result(value, lambda console: console.print(text, end=""), exit_code)


def _compare(setup: VerifySetup, *, plans: Sequence[ParallelConfig]) -> list[PlanResult]:
    """Compare the plans with one process, and print how long that takes and each result."""
    started = time.monotonic()
    reference = run_reference(setup)
    seconds = time_of_plans(plans, reference_s=time.monotonic() - started)
    show_progress(f"{len(plans)} plans, about {show_seconds(seconds)} on this machine")
    verdicts: list[PlanResult] = []
    started = time.monotonic()
    for verdict in compare_plans(setup, plans=plans, reference=reference):
        verdicts.append(verdict)
        left = time_left(plans, done=len(verdicts), seconds=time.monotonic() - started)
        _print_verdict(verdict, of=len(plans), left=left, number=len(verdicts))
    return verdicts


def _print_verdict(verdict: PlanResult, *, of: int, left: float, number: int) -> None:
    word = "equal" if verdict.equal else "; ".join(verdict.problems)
    style = "dim" if verdict.equal else "red"
    more = f" ({show_seconds(left)} left)" if number < of else ""
    ranks = f"{number}/{of} {verdict.world_size} ranks, {verdict.plan}: {word}{more}"
    stderr.print(ranks, style=style)


def _to_markdown(verdicts: list[PlanResult], *, setup: VerifySetup, rejected: list[str]) -> str:
    rejections = "".join(f"- {line}\n" for line in rejected)
    parts = [
        to_markdown(verdicts),
        f"{summarize(verdicts)}. {tolerances_text(setup.tolerances)}",
        rejections,
    ]
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def _to_json(verdicts: list[PlanResult]) -> dict[str, Any]:
    rows = [
        {
            "ranks": v.world_size,
            "plan": v.plan,
            "parallel": v.parallel.to_dict(),
            "differences": None if v.differences is None else asdict(v.differences),
            "problems": v.problems,
            "step_s": v.step_s,
        }
        for v in verdicts
    ]
    return {"summary": summarize(verdicts), "plans": rows}
