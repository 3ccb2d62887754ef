"""What the verbs share: two consoles (stdout is data, stderr is talk), one way to answer."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moesaic.core.errors import UserError

JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one config key; may be repeated."),
]
UseOption = Annotated[
    list[Path] | None,
    typer.Option("--use", metavar="FILE.py", help="Load your own routers, tasks, ... first."),
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/demo.")
]

stderr = Console(stderr=True)


def show_progress(text: str) -> None:
    """Print a line of progress on stderr."""
    stderr.print(f"[dim]{escape(text)}[/]", highlight=False)


def command_app(**settings: Any) -> typer.Typer:
    """Return the Typer app of one verb: our errors pass through it, help text keeps its lines."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def import_user_files(files: list[Path] | None) -> None:
    """Import a user's own files, so that what they define joins its families.

    Raises UserError when a file is not there; what goes wrong inside it is shown as it is.
    """
    for file in files or []:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise UserError(f"--use {file}: there is no such Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)


def print_result(value: dict[str, Any], *, as_json: bool, show: Callable[[Console], None]) -> None:
    """Show the answer to a person, or print it as the last line of stdout for a program."""
    if as_json:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    else:
        show(Console())
