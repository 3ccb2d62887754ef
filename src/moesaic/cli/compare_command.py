"""``moesaic compare``: put runs beside each other: scores, curves and config differences."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, print_table
from moesaic.cli.styled_text import styled

with deferred():
    from moesaic.report.comparison_page import write_comparison
    from moesaic.report.run_comparison import RunComparison

app = command_app()


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help="Two or more run directories.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> Result:
    """Compare runs: scores on the same strings, overlaid curves, config differences, in one page.

    What cannot be compared (losses of different tokenizers, scores on different strings) is said.

    Example: [cyan]moesaic compare runs/a runs/b --out compare.html[/]
    """
    comparison = RunComparison.read(runs)
    page = write_comparison(comparison, out)
    value = comparison.to_dict() | {"page": str(page)}
    return Result(value, lambda console: _show(comparison, page, console))


def _show(comparison: RunComparison, page: Path, console: Console) -> None:
    names = [run.name for run in comparison.runs]
    tables = (
        ("", comparison.facts()),
        ("chrF++ / BLEU", comparison.scores()),
        ("config", comparison.config_differences()),
    )
    for title, rows in tables:
        if rows:
            cells = [[first, *values] for first, values in rows.items()]
            print_table(console, [title, *names], cells)
            console.print()
    for note in comparison.notes():
        console.print(styled("[yellow]{note}[/]", note=note))
    console.print(f"page: {page}")
