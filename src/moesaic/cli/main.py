"""Command-line entry point: ``moesaic COMMAND`` imports and runs that command's module."""

import importlib
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moesaic.core.errors import UserError, did_you_mean
from moesaic.core.version import __version__

COMMANDS = {
    "demo": "data, training, scores and report in ten minutes",
    "train": "train a recipe or a config file; resume a run",
    "launch": "write a job file for many machines: SLURM, Kubernetes, SkyPilot, torchrun",
    "translate": "translate lines with a trained run",
    "eval": "score a run on held-out strings or on your own test set",
    "curve": "score every kept checkpoint of a run",
    "ckpt": "inspect, compare, verify and reshard checkpoints",
    "routes": "show, count and compare recorded routing",
    "verify": "check that a config trains the same under every parallel plan",
    "explain": "parameters, FLOPs and memory of a config, before anything runs",
    "scale": "memory and communication of each rank under a parallel plan",
    "data": "build and inspect corpora",
    "report": "write the HTML report of a run",
    "bench": "benchmark a layer beside dense layers and other libraries",
    "config": "list recipes; print, compare and upgrade configs; JSON Schema",
    "doctor": "hardware, versions, and the selected implementation of each op",
}


RENAMED_OPTIONS = {
    ("ckpt", "--ranks"): "--shards",
    ("ckpt", "--whole"): "--full",
    ("launch", "--fewest-nodes"): "--min-nodes",
    ("launch", "--on"): "--launcher",
    ("launch", "--restarts"): "--max-restarts",
    ("launch", "--run"): "--run-dir",
    ("scale", "--mixed"): "--mixed-precision",
    ("scale", "--rehearse"): "--dry-run",
    ("scale", "--rows"): "--micro-batch",
    ("scale", "--world"): "--world-size",
    ("verify", "--world"): "--world-size",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit code 0: done, 2: a mistake of the user, 1: a bug."""
    # Spinning threads make a step six times slower when another program uses the cores
    # (docs/log.md). OpenMP reads the variable when torch is first imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        _show_commands()
        return
    if words[0] in ("--version", "-V"):
        Console(highlight=False).print(f"moesaic {__version__}")
        return
    command, *rest = words
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        _fail(UserError(f'unknown command "{command}"{hint} (moesaic --help lists them)'), rest)
    for word in rest:
        old = word.partition("=")[0]
        if (command, old) in RENAMED_OPTIONS:
            new = RENAMED_OPTIONS[command, old]
            _fail(UserError(f"{command}: the option {old} is now called {new}"), rest)
    module = importlib.import_module(f"moesaic.cli.{command}_command")
    try:
        module.app(rest, prog_name=f"moesaic {command}")
    except UserError as error:
        _fail(error, rest)
    except BrokenPipeError:  # the reader of our output (e.g. head) has closed it
        sys.stderr.close()
        sys.exit(0)


def _fail(error: UserError, words: Sequence[str]) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] {_escaped(str(error))}")
    if "--json" in words:
        sys.stdout.write(json.dumps({"error": str(error)}, ensure_ascii=False) + "\n")
    sys.exit(2)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _show_commands() -> None:
    console = Console()
    table = Table(box=None, show_header=False, padding=(0, 2))
    for command, summary in COMMANDS.items():
        table.add_row(f"[bold cyan]{command}[/]", summary)
    console.print(
        f"[bold]moesaic[/] {__version__}: multilingual Mixture-of-Experts models in PyTorch\n"
    )
    console.print("usage: moesaic COMMAND [OPTIONS]      (moesaic COMMAND --help has an example)\n")
    console.print(table)
