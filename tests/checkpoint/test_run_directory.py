import pytest

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import CheckpointError


def make_run(path):
    path.mkdir(exist_ok=True)
    run = RunDir(path)
    run.config.write_text("")
    return run


def test_a_misspelt_run_names_the_nearest(tmp_path):
    make_run(tmp_path / "demo")
    with pytest.raises(CheckpointError, match='did you mean "demo"'):
        RunDir.open(tmp_path / "dmeo")


def test_a_directory_of_runs_is_not_a_run(tmp_path):
    make_run(tmp_path / "demo")
    with pytest.raises(CheckpointError, match="contains the runs demo"):
        RunDir.open(tmp_path)


def test_an_unfinished_run_is_an_error_with_the_missing_files_and_the_fix(tmp_path):
    run = make_run(tmp_path)
    run.tokenizer.write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors missing.*--resume"):
        run.require_text_model()
    run.model.write_text("")
    run.require_text_model()
