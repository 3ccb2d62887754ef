"""Every recipe's resolved config is a text file under review: ``make golden`` rewrites them."""

import json
import os
from pathlib import Path

import pytest

from moesaic.recipes.lookup import RECIPES
from moesaic.train.run import Run
from moesaic.train.run_checks import check_run

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


@pytest.mark.parametrize("steps", [20, 21, 37, 100, 901, 10**4, 10**6])
@pytest.mark.parametrize("name", RECIPES)
def test_the_steps_of_every_recipe_can_be_changed(name: str, steps: int) -> None:
    run = RECIPES(name).override([f"steps={steps}"])
    check_run(run)
    some = range(0, steps, max(1, steps // 1000))
    factors = [run.schedule.lr_factor(step, steps=steps) for step in some]
    assert max(factors) > 0.99
    assert run.schedule.lr_factor(steps - 1, steps=steps) < 0.2
    assert factors.index(max(factors)) <= 0.06 * len(factors) + 1  # warmed up early
