"""``moesaic curve``: translation scores of a run at each of its checkpoints."""

from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    JsonOption,
    RunArgument,
    UseOption,
    command_app,
    print_result,
    print_table,
    show_progress,
)
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.cli.eval_command import held_out_tests
    from moesaic.core.units import show_count
    from moesaic.recipes.lookup import find_recipe
    from moesaic.serve.learning_curve import learning_curve

app = command_app()


@app.command()
def curve(
    run: RunArgument,
    *,
    limit: Annotated[int, typer.Option(min=1, help="Sentences per language.")] = 20,
    split: Annotated[str, typer.Option(help="valid or test, of the run's corpus.")] = "valid",
    target: Annotated[str | None, typer.Option("--to", help="Only this target language.")] = None,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score every kept checkpoint (chrF++), beside copying and a translation memory.

    Works during a run; checkpoints are scored once. Writes curve.json into the run directory, which
    the report shows. Keep more checkpoints with --set checkpoint.keep=20.

    Example: [cyan]moesaic curve runs/demo --limit 50[/]
    """
    import_user_files(files)
    config = find_recipe(str(run))
    corpus = config.corpus.open()
    tests = held_out_tests(config, corpus=corpus, split=split, limit=limit, target=target)
    found = learning_curve(run, tests=tests, corpus=corpus, limit=limit, on_point=_print_point)
    print_result(found, as_json=as_json, show=lambda console: _show(found, console))


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
