import importlib
import json
import pkgutil
import re
import subprocess
import sys
from typing import Any

import pytest
from schema_fits import fits
from test_config import Both, Layer, LayerNorm, Model, RMSNorm, TopK

import moesaic
from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError

SCHEMA = json.loads(Model.schema_json())
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


def test_a_fresh_process_knows_every_member_that_a_config_may_name() -> None:
    code = "import moesaic.train.run; from moesaic.core.config import Choice\n"
    code += "print('\\n'.join(f'{f} {m}' for f, known in Choice.families.items() for m in known))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    fresh = {tuple(line.split()) for line in done.stdout.splitlines()}
    for module in pkgutil.walk_packages(moesaic.__path__, "moesaic."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = {
        (family, name)
        for family, known in Choice.families.items()
        for name, member in known.items()
        if member.__module__.startswith("moesaic.")
    }
    late = {(family, name) for family, name in ours - fresh if family in dict(fresh)}
    assert late == {MADE_BY_THE_PLANNER}
