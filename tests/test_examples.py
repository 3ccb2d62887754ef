"""The numbered examples run as they stand."""

import functools
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_an_example_runs_as_it_stands(name, tmp_path, data_home, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # graphs as they are traced, without the generation of code, which takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.strip()
