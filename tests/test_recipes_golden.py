"""Every recipe's resolved config is a text file under review: ``make golden`` rewrites them."""

import json
import os
from pathlib import Path

import pytest

from moesaic.recipes.lookup import RECIPES
from moesaic.train.run import Run

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("MOESAIC_WRITE_GOLDEN") == "1"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_was_reviewed(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    text = "\n".join(RECIPES(name).to_flat_lines()) + "\n"
    if WRITE:
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"a new recipe: run `make golden` and look at {path.name}"
    assert text.splitlines() == path.read_text(encoding="utf-8").splitlines(), (
        "if the change is meant, run `make golden` and look at the difference"
    )


def test_no_golden_file_is_left_of_a_recipe_that_is_gone() -> None:
    left = {path.stem for path in GOLDEN.glob("*.txt")} - set(RECIPES)
    if WRITE:
        for name in left:
            (GOLDEN / f"{name}.txt").unlink()
        left = set()
    assert not left


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_back_from_its_yaml(name: str) -> None:
    run = RECIPES(name)
    assert Run.from_yaml(run.to_yaml()) == run


def test_the_schema_of_a_run_describes_every_recipe_key() -> None:
    schema = json.loads(Run.schema_json())
    for name in RECIPES:
        assert set(RECIPES(name).to_dict()) == set(schema["properties"])
    assert "Norm.RMSNorm" in schema["$defs"]
    assert "Optimizer.Muon" in schema["$defs"]
