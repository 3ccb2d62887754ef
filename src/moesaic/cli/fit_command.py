"""``moesaic fit``: the scaling law of one's own runs."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, UseOption, command_app, print_table
from moesaic.cli.styled_text import styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.core.errors import DataError
    from moesaic.model.parameter_flop_count import count_parameters
    from moesaic.monitor.metric_writers import read_metrics
    from moesaic.planner.fit_law import FittedLaw, RunPoint, fit_law
    from moesaic.recipes.lookup import find_recipe

app = command_app()


@app.command()
def fit(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run directories.")],
    *,
    resamples: Annotated[int, typer.Option(min=2, max=10_000, help="Bootstrap resamples.")] = 100,
    budget: Annotated[
        float | None, typer.Option(min=1, metavar="FLOPS", help="Divide a budget by the law.")
    ] = None,
    files: UseOption = None,
) -> Result:
    """Fit ``L(N, D) = E + A / N^alpha + B / D^beta`` to the last validation losses of runs.

    N are active parameters without embeddings, D tokens. At least six runs of three sizes and three
    numbers of tokens; a schedule that ends at the run's last step (each run a point of its own).

    Example: [cyan]moesaic fit runs/size-* --budget 1e16[/]
    """
    import_user_files(files)
    points = [_point(run) for run in runs]
    found = fit_law(points, resamples=resamples)
    value = found.to_dict() | {"runs": [point.name for point in points]}
    if budget is not None:
        best = found.law.optimum(budget)
        value["optimum"] = {
            "flops": budget,
            "parameters": best.parameters,
            "tokens": best.tokens,
            "loss": found.law.loss(best.parameters, tokens=best.tokens),
        }
    return Result(value, partial(_show, found, value))


def _point(path: Path) -> RunPoint:
    """Return the last validation loss of a run. Raises DataError if it has none."""
    run = RunDir.open(path)
    last = {}
    for row in read_metrics(run.metrics) if run.metrics.is_file() else ():
        last |= {name: row[name] for name in ("valid/loss", "train/tokens") if name in row}
    if len(last) < 2:
        raise DataError(
            f"{path}: its metrics.jsonl has no valid/loss beside train/tokens; train it with "
            "validation (--set validation.every=N)"
        )
    entries = count_parameters(find_recipe(str(path)).model).entries
    active = sum(e.size * e.active_fraction for e in entries if e.kind != "embedding")
    return RunPoint(path.name, active, last["train/tokens"], last["valid/loss"])


def _show(found: FittedLaw, value: dict[str, Any], console: Console) -> None:
    law = found.to_dict()["law"]
    rows = [
        (name.replace("_", " "), f"{law[name]:.4g}", f"{low:.4g} to {high:.4g}")
        for name, (low, high) in found.intervals.items()
    ]
    print_table(console, ("constant", "value", "95 %"), rows)
    held = ", ".join(found.held_out)
    console.print(
        f"error of the loss: {found.fit_error:.2%} of these runs, {found.held_out_error:.2%} of "
        f"{held}, which that fit had not seen"
    )
    if (best := value.get("optimum")) and isinstance(best, dict):
        words = "for {flops:.3g} FLOPs: {parameters:.3g} parameters, {tokens:.3g} tokens, "
        console.print(styled(words + "loss {loss:.3f}", **best))
