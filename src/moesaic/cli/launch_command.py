"""``moesaic launch``: write the job file that starts a training run on many machines."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    RecipeArgument,
    Result,
    SetOption,
    UseOption,
    command_app,
    stderr,
)
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.core.config_text import parse_call
    from moesaic.core.errors import ConfigError, did_you_mean
    from moesaic.distributed.launchers import (
        Kubernetes,
        Launcher,
        LaunchJob,
        SkyPilot,
        Slurm,
        Torchrun,
    )
    from moesaic.recipes.lookup import find_recipe
    from moesaic.train.run import Run
    from moesaic.train.run_checks import check_run

app = command_app()


@app.command()
def launch(
    which: RecipeArgument,
    *,
    nodes: Annotated[int, typer.Option(help="Number of machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-node", help="GPUs (ranks) of each machine.")],
    launcher_text: Annotated[
        str,
        typer.Option(
            "--launcher",
            metavar="torchrun|slurm|kubernetes|skypilot",
            help='With settings: --launcher "Slurm(time=12:00:00)" needs quotes inside.',
        ),
    ] = "torchrun",
    changes: SetOption = None,
    run_dir: Annotated[str | None, typer.Option(help="Run directory on those machines.")] = None,
    max_restarts: Annotated[int, typer.Option(help="Restarts after a failure.")] = 3,
    min_nodes: Annotated[int | None, typer.Option(help="Continue with so few machines.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the file here.")] = None,
    shown: Annotated[
        bool, typer.Option("--print", help="Print the file (the default without --out).")
    ] = False,
    files: UseOption = None,
) -> Result:
    """Write the job file of a training run on many machines, with restarts and resuming.

    Example: [cyan]moesaic launch multilingual-50 --nodes 4 --gpus-per-node 8 --launcher slurm[/]

    With settings: [cyan]--launcher 'Slurm(time="12:00:00", partition="gpu")'[/]

    To a file: [cyan]moesaic launch demo --gpus-per-node 8 --launcher torchrun --out demo.sh[/]
    """
    import_user_files(files)
    run = find_recipe(which, changes=changes or [])
    check_run(run)
    launcher = parse_launcher(launcher_text)
    job = LaunchJob(
        name=run.name,
        command=_train_command(which, run_dir or f"runs/{run.name}", changes, files),
        description=_describe_job(run, nodes=nodes, gpus=gpus),
        nodes=nodes,
        gpus_per_node=gpus,
        max_restarts=max_restarts,
        min_nodes=min_nodes,
    )
    run.parallel.plan.resolve(job.world_size)  # raises if the plan does not fit
    text = launcher.render(job)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    start = _start_command(launcher, out)
    stderr.print(f"{job.description}. Start it with: {start}")
    value = {"world": job.world_size, "nodes": nodes, "gpus_per_node": gpus, "file": text}
    value |= {"out": None if out is None else str(out), "launcher": type(launcher).__name__}
    printed = text if shown or out is None else ""
    return Result(value, lambda _: sys.stdout.write(printed))


def parse_launcher(text: str) -> Launcher:
    """Parse ``slurm`` or ``Slurm(time="12:00:00")``. Raises ConfigError."""
    launchers = {kind.__name__.lower(): kind for kind in (Torchrun, Slurm, Kubernetes, SkyPilot)}
    fields = parse_call(text) or {"kind": text}
    kind = str(fields["kind"])
    member = launchers.get(kind.lower())
    if member is None:
        known = ", ".join(launchers)
        nearest = did_you_mean(kind, launchers)
        raise ConfigError([f'--launcher: found "{kind}", expected one of {known}{nearest}'])
    try:
        return member.from_dict(fields | {"kind": member.__name__})
    except ConfigError as error:
        name = member.__name__
        hint = f"write it as --launcher '{name}(...)', with quotes around texts"
        raise ConfigError(
            f"--launcher {name}.{problem} ({hint})" for problem in error.problems
        ) from error


def _train_command(
    which: str, run_dir: str, changes: list[str] | None, files: list[Path] | None
) -> tuple[str, ...]:
    words = ["-m", "moesaic", "train", which, "--out", run_dir, "--resume", "auto"]
    words += [word for change in changes or [] for word in ("--set", change)]
    words += [word for file in files or [] for word in ("--use", str(file))]
    return tuple(words)


def _describe_job(run: Run, *, nodes: int, gpus: int) -> str:
    tokens = f"{run.data.max_batch_tokens():,} tokens"
    return (
        f"{run.name}: {nodes} x {gpus} GPUs = {nodes * gpus} ranks, a micro-batch of {tokens} over "
        "all of them"
    )


def _start_command(launcher: Launcher, out: Path | None) -> str:
    return launcher.submit_command.replace(
        "FILE", f"FILE{launcher.suffix}" if out is None else str(out)
    )
