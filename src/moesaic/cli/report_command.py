"""``moesaic report``: write the self-contained HTML report of a run from its files."""

from typing import Annotated

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    JsonOption,
    RunArgument,
    command_app,
    print_result,
    show_progress,
)

with deferred():
    from moesaic.cli.eval_command import held_out_tests
    from moesaic.recipes.lookup import find_recipe
    from moesaic.report.html_report import write_report
    from moesaic.serve.translation_routing import trace_checkpoints

app = command_app()
_SENTENCES = 16  # per language, to compare the routing of checkpoints


@app.command()
def report(
    run: RunArgument,
    *,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Route held-out text with each kept checkpoint.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write report.html: losses, scores, routing and router health. It opens offline.

    Example: [cyan]moesaic report runs/demo[/]
    """
    if checkpoints:
        config = find_recipe(str(run))
        tests = held_out_tests(config, corpus=config.corpus.open(), split="valid", limit=_SENTENCES)
        files = trace_checkpoints(run, tests=tests)
        show_progress(f"routed held-out text with {len(files)} checkpoints")
    path = write_report(run)

    def show(console: Console) -> None:
        console.print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")

    print_result({"report": str(path)}, as_json=as_json, show=show)
