import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from schema_fits import fits
from test_config import Both, Layer, LayerNorm, Model, RMSNorm, TopK

import moesaic
from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError

SCHEMA = json.loads(Model.schema_json())
PACKAGE = Path(moesaic.__path__[0])
IMPORT = re.compile(r"^(?:from|import) (moesaic[\w.]*)(?: import (\([^)]*\)|.*))?", re.M)
MADE_BY_THE_PLANNER = ("moesaic.moe.expert_selection.Select", "SimulatedTopK")  # never written


@pytest.mark.parametrize(
    "model",
    [
        Model(dim=4),
        Model(dim=8, norm=LayerNorm(bias=True), select=TopK(k=3), extra=Layer(norm=RMSNorm())),
        Model(dim=8, select=Both(first=Both()), by_name={"x": Layer()}, clip=0.5),
    ],
)
def test_the_schema_takes_what_a_config_writes(model: Model) -> None:
    assert fits(model.to_dict(), SCHEMA)


def test_the_schema_takes_a_choice_in_words() -> None:
    assert fits({"dim": 4, "norm": "LayerNorm(bias=true)", "select": "TopK"}, SCHEMA)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"dim": "a"},
        {"dim": 0},
        {"dim": 4, "dimm": 4},
        {"dim": 4, "norm": "Norm"},
        {"dim": 4, "norm": {"kind": "Norm"}},
        {"dim": 4, "norm": {"eps": 1.0}},
        {"dim": 4, "norm": {"kind": "RMSNorm", "bias": True}},
        {"dim": 4, "layers": [{"width": "x"}]},
        {"dim": 4, "select": {"kind": "Both", "second": {"kind": "Both"}}},
        {"dim": 4, "size": "medium"},
    ],
)
def test_the_schema_refuses_what_the_config_refuses(wrong: dict[str, Any]) -> None:
    assert not fits(wrong, SCHEMA)
    with pytest.raises(ConfigError):
        Model.from_dict(wrong)


def test_a_default_carries_its_kind() -> None:
    properties = SCHEMA["properties"]
    assert properties["norm"]["default"] == RMSNorm().to_dict()
    assert properties["layers"]["default"] == [Layer().to_dict()]
    assert SCHEMA["$defs"]["Select.Both"]["properties"]["second"]["default"] == TopK(k=2).to_dict()


def test_docstrings_are_descriptions() -> None:
    assert SCHEMA["title"] == "Model"
    assert SCHEMA["description"] == "A model."
    assert SCHEMA["properties"]["dim"]["description"] == "Width of the model."
    assert SCHEMA["properties"]["norm"]["description"] == "Family of norms."
    assert SCHEMA["$defs"]["Norm.RMSNorm"]["description"] == "Root mean square."
    assert SCHEMA["$defs"]["Norm.RMSNorm"]["properties"]["eps"]["description"].startswith("Added")


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(SCHEMA)
    assert '"family"' not in text
    assert set(re.findall(r'"#/\$defs/([^"]+)"', text)) == set(SCHEMA["$defs"])


def imported_by(first: str) -> set[str]:
    """The modules of ours that importing one loads, read from the unindented imports."""
    known, new = set(), {first}
    while new:
        name = new.pop()
        place = PACKAGE.parent / name.replace(".", "/")
        files = [
            each for each in (place.with_suffix(".py"), place / "__init__.py") if each.exists()
        ]
        if name in known or not files:  # a name in a module
            continue
        known.add(name)
        new.add(name.rpartition(".")[0])
        for module, names in IMPORT.findall(files[0].read_text(encoding="utf-8")):
            new |= {module, *(f"{module}.{each}" for each in re.findall(r"\w+", names))}
    return known


def test_a_fresh_process_knows_every_member_that_a_config_may_name() -> None:
    """No process is started: importing torch in one takes seconds."""
    fresh = imported_by("moesaic.train.run")
    for module in pkgutil.walk_packages(moesaic.__path__, "moesaic."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    late = set()
    for family, known in Choice.families.items():
        modules = {name: member.__module__ for name, member in known.items()}
        if fresh & set(modules.values()):
            ours = {name for name, module in modules.items() if module.startswith("moesaic.")}
            late |= {(family, name) for name in ours if modules[name] not in fresh}
    assert late == {MADE_BY_THE_PLANNER}
