"""``moesaic train``: a recipe or a config file to a trained run directory, or a run continued."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moesaic.cli.common import Json, Set, answer, talk, verb_app
from moesaic.core.units import show_count, show_seconds
from moesaic.recipes.find import find
from moesaic.train.job import train as run_training
from moesaic.train.result import Result
from moesaic.train.resume import Auto, Fresh, From, Resume

app = verb_app()


@app.command()
def train(
    which: Annotated[
        str, typer.Argument(metavar="RECIPE|CONFIG", help="A recipe, a config.yaml or a run.")
    ],
    *,
    changes: Set = None,
    out: Annotated[Path | None, typer.Option(help="The run directory [runs/NAME].")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|DIR", help="Continue: from --out, or from DIR.")
    ] = None,
    until: Annotated[int | None, typer.Option(help="Stop after this step; resume later.")] = None,
    as_json: Json = False,
) -> None:
    """Train. Ctrl-C saves and says how to go on; the same command with --resume auto goes on.

    Example: [cyan]moesaic train demo --set steps=200 --out runs/mine[/]

    On several processes: [cyan]torchrun --nproc-per-node 2 -m moesaic train demo[/]
    """
    run = find(which, changes=changes or [])
    folder = out or Path("runs") / run.name
    result = run_training(run, folder, resume=resume_from(resume), until=until, say=_say)
    value = asdict(result) | {"out": str(result.out)}
    answer(value, as_json=as_json, show=lambda console: _show(result, which, console))
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def resume_from(text: str | None) -> Resume:
    """Read ``--resume``: nothing, ``auto``, or a directory."""
    if text is None:
        return Fresh()
    return Auto() if text == "auto" else From(path=text)


def _say(sentence: str) -> None:
    talk.print(f"[dim]{escape(sentence)}[/]", highlight=False)


def _show(result: Result, which: str, console: Console) -> None:
    speed = result.tokens / max(result.seconds, 1e-9)
    console.print(
        f"[bold]{result.out}[/]: {result.stopped} after step {result.steps:,}, "
        f"{show_count(result.tokens)} tokens; this call took {show_seconds(result.seconds)} "
        f"({show_count(speed)} tokens/s)",
        highlight=False,
    )
    if result.stopped == "finished":
        console.print(f"next: moesaic eval {result.out}", highlight=False)
    else:
        again = f"moesaic train {which} --out {result.out} --resume auto"
        console.print(f"to go on: {again}", highlight=False)


