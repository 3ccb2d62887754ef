"""``moesaic config``: list recipes, print, compare and upgrade configs, print the JSON Schema."""

import difflib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    RecipeArgument,
    Result,
    SetOption,
    UseOption,
    command_app,
    print_table,
)
from moesaic.cli.styled_text import styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.core.config_upgrade import describe_renames, upgrade_config
    from moesaic.core.errors import ConfigError
    from moesaic.core.files import atomic_write
    from moesaic.core.yaml_reader import read_yaml_file
    from moesaic.corpus.corpus_recipes import CorpusRecipe
    from moesaic.model.presets import PRESETS
    from moesaic.recipes.lookup import RECIPES, find_recipe
    from moesaic.train.run import Run

app = command_app(no_args_is_help=True, help="Recipes and configs as text.")


@app.command()
def recipes(*, files: UseOption = None) -> Result:
    """List the recipes (whole runs) and the presets (published models), those of --use too.

    Example: [cyan]moesaic config recipes[/]
    """
    import_user_files(files)
    value = {"recipes": RECIPES.descriptions(), "presets": PRESETS.descriptions()}
    return Result(value, lambda console: _show(value, console))


@app.command()
def show(which: RecipeArgument, *, changes: SetOption = None, files: UseOption = None) -> Result:
    """Print a resolved config as YAML: save it, edit it, train it.

    Example: [cyan]moesaic config show demo > mine.yaml[/]
    """
    import_user_files(files)
    run = find_recipe(which, changes=changes or [])
    return Result(run.to_dict(), lambda _: sys.stdout.write(run.to_yaml()))


@app.command()
def diff(first: RecipeArgument, second: RecipeArgument, *, files: UseOption = None) -> Result:
    """Print the keys that differ between two configs.

    Example: [cyan]moesaic config diff demo runs/demo/config.yaml[/]
    """
    import_user_files(files)
    before, after = find_recipe(first).to_flat_lines(), find_recipe(second).to_flat_lines()
    lines = [x for x in difflib.ndiff(before, after) if x[0] in "+-"]
    text = "".join(f"{line}\n" for line in lines)
    return Result({"lines": lines}, lambda _: sys.stdout.write(text))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for completion and validation in editors.

    Example: [cyan]moesaic config schema > moesaic.schema.json[/]
    """
    sys.stdout.write(Run.schema_json() + "\n")


@app.command()
def upgrade(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE|RUN", help="A config.yaml, a corpus recipe or a run."),
    ],
) -> Result:
    """Rewrite a config of an earlier version with the present names of keys and kinds.

    The original is kept beside it as config.yaml.old.

    Example: [cyan]moesaic config upgrade runs/demo[/]
    """
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError([f"{file}: there is no such config file"])
    value = read_yaml_file(file)
    if not isinstance(value, dict):
        raise ConfigError([f"{file}: not a config, which is a mapping of names to values"])
    config = CorpusRecipe if "source" in value else Run
    upgraded, renamed = upgrade_config(value, config=config.__name__)
    if renamed:
        text = config.from_dict(upgraded).to_yaml()
        atomic_write(file.with_name(f"{file.name}.old"), file.read_bytes())
        atomic_write(file, text)
    value = {"path": str(file), "renamed": renamed}
    return Result(value, lambda console: _show_renamed(file, renamed, console))


def _show_renamed(file: Path, renamed: dict[str, str], console: Console) -> None:
    for line in describe_renames(renamed):
        console.print(line)
    done = f"{len(renamed)} names rewritten" if renamed else "nothing to rewrite"
    console.print(f"{file}: {done}")


def _show(value: dict[str, dict[str, str]], console: Console) -> None:
    titles = {
        "recipes": "recipes: moesaic train NAME",
        "presets": "\npresets of published models: moesaic explain NAME, moesaic scale NAME",
    }
    for kind, lines in value.items():
        rows = ((styled("[bold cyan]{name}[/]", name=name), line) for name, line in lines.items())
        print_table(console, ("", ""), rows, title=titles[kind], align="ll")
