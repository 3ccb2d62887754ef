"""Find: a recipe's name, or the path of a YAML file, to the Run it stands for."""

from pathlib import Path

from moesaic.core.errors import ConfigError
from moesaic.recipes import demo_recipe, multilingual_recipes, tiny_recipes
from moesaic.recipes.recipe_registry import RECIPES
from moesaic.train.run import Run

__all__ = ["RECIPES", "find_recipe"]
MODULES = (
    demo_recipe,
    multilingual_recipes,
    tiny_recipes,
)  # importing a module registers its recipes


def find_recipe(which: str, *, changes: list[str] | None = None) -> Run:
    """Return the Run of a recipe, a config file, or a run directory, with ``changes`` applied.

    Raises UserError: no recipe or file of that name, or a config that is wrong (each key named).
    """
    run = _named(which)
    return run.override(changes) if changes else run


def _named(which: str) -> Run:
    path = Path(which)
    if path.is_dir():
        path = path / "config.yaml"
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ConfigError([f"{path}: there is no such config file"]) from error
        try:
            return Run.from_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {problem}" for problem in error.problems) from error
    return RECIPES(which)
