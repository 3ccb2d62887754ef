"""``moesaic report``: one self-contained HTML file about a run, written from its files."""

from typing import Annotated

import typer
from rich.console import Console

from moesaic.cli.eval_command import held_out_tests
from moesaic.cli.shared_options import JsonOption, RunArgument, command_app, print_result, stderr
from moesaic.recipes.lookup import find_recipe
from moesaic.report.html_report import write_report
from moesaic.serve.translation_routing import trace_checkpoints

app = command_app()
_SENTENCES = 16  # per language, for checkpoints


@app.command()
def report(
    run: RunArgument,
    *,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Route held-out text with each kept checkpoint.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write report.html anew: losses, scores, routing, health. Open it in any browser, offline.

    Example: [cyan]moesaic report runs/demo[/]
    """
    if checkpoints:
        config = find_recipe(str(run))
        tests = held_out_tests(config, corpus=config.corpus.open(), split="valid", limit=_SENTENCES)
        found = trace_checkpoints(run, tests=tests)
        stderr.print(f"[dim]routed held-out text with {len(found)} checkpoints[/]", highlight=False)
    path = write_report(run)

    def show(console: Console) -> None:
        console.print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)", highlight=False)

    print_result({"report": str(path)}, as_json=as_json, show=show)
