import pytest

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import CheckpointError


def test_a_created_run_opens_and_keeps_its_first_config(tmp_path):
    RunDir.create(tmp_path / "demo", config_yaml="a: 1\n")
    RunDir.create(tmp_path / "demo", config_yaml="a: 2\n")
    assert RunDir.open(tmp_path / "demo").config.read_text() == "a: 1\n"


def test_a_misspelt_run_names_the_nearest(tmp_path):
    RunDir.create(tmp_path / "demo", config_yaml="")
    with pytest.raises(CheckpointError, match='did you mean "demo"'):
        RunDir.open(tmp_path / "dmeo")


def test_a_directory_of_runs_is_not_a_run(tmp_path):
    RunDir.create(tmp_path / "demo", config_yaml="")
    with pytest.raises(CheckpointError, match="holds the runs demo"):
        RunDir.open(tmp_path)


def test_an_unfinished_run_says_what_is_missing_and_the_way_out(tmp_path):
    run = RunDir.create(tmp_path, config_yaml="")
    run.tokenizer.write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors missing.*--resume"):
        run.require_model()
    run.model.write_text("")
    run.require_model()
