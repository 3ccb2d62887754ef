"""``moesaic train``: train a recipe or config file, or resume a run."""

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import JsonOption, SetOption, UseOption, command_app, print_result
from moesaic.cli.styled_text import styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.checkpoint.manifest import MANIFEST_FILE
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.checkpoint.trained_directions import read_trained_directions
    from moesaic.cli.evaluated_run import EvaluatedRun
    from moesaic.cli.evaluated_texts import is_language_model
    from moesaic.core.errors import UserError
    from moesaic.core.units import show_count, show_seconds
    from moesaic.recipes.lookup import find_recipe, warm_start
    from moesaic.train.loop import TrainingResult
    from moesaic.train.resume import Resume, ResumeFrom, ResumeLatest, StartFresh
    from moesaic.train.run import Run
    from moesaic.train.run_training import train as run_training
    from moesaic.train.training_hooks import no_progress, terminal_progress

app = command_app()


@app.command()
def train(
    which: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|CONFIG]", help="A recipe or a config.yaml.")
    ] = None,
    *,
    changes: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="The run directory (runs/NAME).")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|DIR", help="Continue the run in --out (auto) or in DIR."),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Start from the weights and the tokenizer of a run."),
    ] = None,
    until: Annotated[int | None, typer.Option(min=1, help="Stop after this step.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress output.")] = False,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train. Ctrl-C saves a checkpoint; the same command with --resume auto continues.

    Example: [cyan]moesaic train demo --set steps=200 --out runs/mine[/]

    Resume: [cyan]moesaic train --resume runs/mine[/]

    Warm start on other data: [cyan]moesaic train --init runs/demo --set steps=300
    --set 'data.corpus=CorpusFolder(path="own")' --out runs/own[/]

    On several processes: [cyan]torchrun --nproc-per-node 2 -m moesaic train demo[/]
    """
    import_user_files(files)
    run = _find_run(which, init=init, resume=resume, changes=changes or [])
    folder = out or (
        Path("runs") / run.name if which or init else run_of_checkpoint(Path(str(resume)))
    )
    result = run_training(
        run,
        folder,
        resume=resume_from(resume),
        until=until,
        progress=no_progress if quiet else terminal_progress,
    )
    value = asdict(result) | {"out": str(result.out)}
    if os.environ.get("RANK", "0") == "0":  # under torchrun only one rank prints
        print_result(value, as_json=as_json, show=lambda console: _show(result, console))
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _find_run(
    which: str | None, *, init: Path | None, resume: str | None, changes: list[str]
) -> Run:
    if init is not None:
        if resume is not None and resume != "auto":
            raise UserError("--init starts a run and --resume DIR continues one: give one of them")
        return warm_start(str(init), which=which, changes=changes)
    if which is None and resume in (None, "auto"):
        raise UserError(
            "nothing to train: name a recipe, a config.yaml, --init RUN, or --resume DIR"
        )
    return find_recipe(which or str(run_of_checkpoint(Path(str(resume)))), changes=changes)


def _next_command(out: Path) -> str:
    """Return the command that scores a run: what it was trained on decides."""
    record = read_trained_directions(RunDir(out).directions)
    has_test_rows = record is not None and any(s.test_rows for s in record.streams)
    if has_test_rows and is_language_model(EvaluatedRun.open(out)):
        return f"eval {shlex.quote(str(out))}"
    return (record.next_command if record else "eval {run}").format(run=shlex.quote(str(out)))


def run_of_checkpoint(path: Path) -> Path:
    """Return the run of a checkpoint ``RUN/checkpoints/step-N``, any other path as it is."""
    return path.parent.parent if (path / MANIFEST_FILE).is_file() else path


def resume_from(text: str | None) -> Resume:
    """Parse ``--resume``: absent, ``auto``, or a directory."""
    if text is None:
        return StartFresh()
    return ResumeLatest() if text == "auto" else ResumeFrom(path=text)


def _show(result: TrainingResult, console: Console) -> None:
    console.print(
        styled(
            "[bold]{out}[/]: {reason} after step {steps:,}, {tokens} tokens; this call took {time}",
            out=result.out,
            reason=result.stop_reason,
            steps=result.steps,
            tokens=show_count(result.tokens),
            time=show_seconds(result.seconds),
        )
    )
    if result.stop_reason == "finished":
        console.print(f"next: moesaic {_next_command(result.out)}")
    else:
        console.print(f"to continue: moesaic train --resume {shlex.quote(str(result.out))}")
