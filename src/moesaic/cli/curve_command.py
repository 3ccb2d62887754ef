"""``moesaic curve``: translation scores of a run at each of its checkpoints."""

from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    CorpusOption,
    Result,
    RunArgument,
    UseOption,
    command_app,
    print_table,
    show_progress,
)
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.cli.evaluated_run import DirectionChoice, EvaluatedRun
    from moesaic.core.units import show_count
    from moesaic.serve.learning_curve import learning_curve

app = command_app()


@app.command()
def curve(
    run: RunArgument,
    *,
    limit: Annotated[int, typer.Option(min=1, max=10**9, help="Sentences per language.")] = 20,
    split: Annotated[str, typer.Option(help="valid or test, of the run's corpus.")] = "valid",
    source: Annotated[str | None, typer.Option("--from", help="Only this source language.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="Only this target language.")] = None,
    corpus_folder: CorpusOption = None,
    files: UseOption = None,
) -> Result:
    """Score every kept checkpoint (chrF++), beside copying and a translation memory.

    Works during a run; checkpoints are scored once. Writes curve.json into the run directory, which
    the report shows. Keep more checkpoints with --set checkpoint.keep=20.

    Example: [cyan]moesaic curve runs/demo --limit 50[/]
    """
    import_user_files(files)
    evaluated = EvaluatedRun.open(run, corpus=corpus_folder)
    corpus = evaluated.corpus()
    choice = DirectionChoice.parse(source, target)
    chosen = evaluated.held_out_tests(corpus, split=split, limit=limit, choice=choice)
    for note in chosen.notes:
        show_progress(note)
    found = learning_curve(
        run, tests=chosen.tests, corpus=corpus.corpus, limit=limit, on_point=_print_point
    )
    return Result(found, lambda console: _show(found, console))


def _print_point(point: Any) -> None:
    show_progress(f"step {point['step']:,}: {point['chrf']['score']:.1f}")


def _show(found: dict[str, Any], console: Console) -> None:
    rows = [
        (f"{p['step']:,}", show_count(p["tokens"]) if p["tokens"] else "", p["chrf"])
        for p in found["points"]
    ]
    rows += [(name, "", score) for name, score in found["baselines"].items()]
    print_table(
        console,
        ("step", "tokens", "chrF++", "95 %"),
        (
            (step, tokens, f"{chrf['score']:.1f}", f"{chrf['low']:.1f} to {chrf['high']:.1f}")
            for step, tokens, chrf in rows
        ),
        title=f"chrF++, mean over {len(found['languages'])} languages ({found['test']})",
        align="r",
    )
