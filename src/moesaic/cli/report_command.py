"""``moesaic report``: write the self-contained HTML report of a run from its files."""

from typing import Annotated

import typer

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    CorpusOption,
    Result,
    RunArgument,
    UseOption,
    command_app,
    show_progress,
)
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.cli.evaluated_run import EvaluatedRun
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
    corpus_folder: CorpusOption = None,
    files: UseOption = None,
) -> Result:
    """Write report.html: losses, scores, routing and router health. It opens offline.

    Example: [cyan]moesaic report runs/demo[/]
    """
    import_user_files(files)
    if checkpoints:
        evaluated = EvaluatedRun.open(run, corpus=corpus_folder)
        chosen = evaluated.held_out_tests(evaluated.corpus(), split="valid", limit=_SENTENCES)
        for note in chosen.notes:
            show_progress(note)
        traced = trace_checkpoints(run, tests=chosen.tests)
        show_progress(f"routed held-out text with {len(traced)} checkpoints")
    path = write_report(run)

    text = f"{path} ({path.stat().st_size / 1024:.0f} KiB)"
    return Result({"report": str(path)}, lambda console: console.print(text))
