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
    "demo": "the whole job in ten minutes: data, training, scores, report",
    "train": "train a recipe or a config file; resume a run",
    "launch": "the file that starts a run on many machines: SLURM, Kubernetes, SkyPilot, torchrun",
    "translate": "translate lines with a trained run",
    "eval": "score a run on held-out strings or on your own test set",
    "curve": "score every kept checkpoint of a run",
    "ckpt": "look into checkpoints, compare, check and reshard them",
    "routes": "look into recorded routing, and compare it",
    "verify": "does a config train alike under every plan of its ranks?",
    "explain": "what a recipe will cost, before anything runs",
    "scale": "what each rank of a plan would hold and send, before there is any",
    "data": "build, count and look at corpora",
    "report": "write a run's HTML report again",
    "bench": "how fast a layer is here, beside dense layers and other libraries",
    "config": "recipes, resolved configs, differences, JSON Schema for editors",
    "doctor": "what this machine has, and which implementation each op takes and why",
}


RENAMED_OPTIONS = {
    ("ckpt", "--ranks"): "--shards",
    ("ckpt", "--whole"): "--unsharded",
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
    # Threads that wait by spinning make a step six times slower as soon as another program wants
    # the cores (docs/log.md). OpenMP reads this when torch is first imported: not before here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        _show_commands()
        return
    if words[0] in ("--version", "-V"):
        Console().print(f"moesaic {__version__}", highlight=False)
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
    except BrokenPipeError:  # "| head" closed our output: nothing is wrong
        sys.stderr.close()
        sys.exit(0)


def _fail(error: UserError, words: Sequence[str]) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False)
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
    console.print(f"[bold]moesaic[/] {__version__}: Mixture-of-Experts models you can check\n")
    console.print("usage: moesaic COMMAND [OPTIONS]      (moesaic COMMAND --help has an example)\n")
    console.print(table)
