import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moesaic.checkpoint.plugins import record_plugins, require_loaded
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import (
    adopt_files,
    read_run_record,
    require_plugins,
    require_unchanged,
    run_problems,
    weights_metadata,
    write_run_record,
)
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.core.config import Choice, Config
from moesaic.core.errors import CheckpointError, UserError
from moesaic.core.yaml_reader import read_yaml_file

CONFIG = "name: a\nmodel:\n  dim: 8\n  attention: {heads: 2}\nsteps: 9\n"


def made_run(path: Path, *, tokenizer: str = '{"a": 1}', value: float = 1.0) -> RunDir:
    run = RunDir(path)
    path.mkdir()
    run.config.write_text(CONFIG)
    run.tokenizer.write_text(tokenizer)
    config = read_yaml_file(run.config)
    metadata = weights_metadata(run, model=config["model"])
    write_tensors(run.model, tensors={"w": torch.full((4,), value)}, metadata=metadata)
    write_run_record(run, config=config, plugins=())
    return run


def test_the_files_of_a_run_belong_together_wherever_it_is_moved(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a")
    shutil.move(run.path, tmp_path / "b")
    assert run_problems(RunDir(tmp_path / "b")) == []


def foreign_tokenizer(run: RunDir, other: RunDir) -> None:
    shutil.copy(other.tokenizer, run.tokenizer)


def foreign_weights(run: RunDir, other: RunDir) -> None:
    shutil.copy(other.model, run.model)


def flipped_byte(run: RunDir, _: RunDir) -> None:
    data = bytearray(run.model.read_bytes())
    data[-3] ^= 64
    run.model.write_bytes(data)


def other_heads(run: RunDir, _: RunDir) -> None:
    run.config.write_text(CONFIG.replace("heads: 2", "heads: 4"))


def missing_key(run: RunDir, _: RunDir) -> None:
    run.config.write_text(CONFIG.replace("heads: 2", ""))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (foreign_tokenizer, r"tokenizer\.json (is too long|was altered)"),
        (foreign_weights, r"model\.safetensors was altered"),
        (flipped_byte, r"model\.safetensors was altered"),
        (other_heads, r"model\.attention\.heads: 4, the run was trained with 2"),
        (missing_key, r"model\.attention\.heads: -, the run was trained with 2"),
    ],
)
def test_a_run_with_an_exchanged_file_is_refused_with_what_differs_until_it_is_adopted(
    tmp_path: Path, change, found: str
) -> None:
    run = made_run(tmp_path / "a")
    change(run, made_run(tmp_path / "b", tokenizer='{"a": 2}', value=2.0))
    with pytest.raises(CheckpointError, match=rf"{found}.*moesaic ckpt adopt"):
        require_unchanged(run)
    adopt_files(run)
    require_unchanged(run)


@pytest.mark.parametrize(
    ("change", "found"),
    [(foreign_tokenizer, "tokenizer.json is not the one"), (other_heads, "was made with 2")],
)
def test_weights_without_a_record_name_their_tokenizer_and_config(
    tmp_path: Path, change, found: str
) -> None:
    run = made_run(tmp_path / "a")
    run.record.unlink()
    require_unchanged(run)
    change(run, made_run(tmp_path / "b", tokenizer='{"a": 2}'))
    with pytest.raises(CheckpointError, match=found):
        require_unchanged(run)


def test_comments_and_order_of_the_config_may_change(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a")
    run.config.write_text("# mine\nsteps: 9\nname: a\nmodel: {attention: {heads: 2}, dim: 8}\n")
    require_unchanged(run)


def test_a_run_of_an_earlier_version_without_record_is_opened(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a")
    run.record.unlink()
    write_tensors(run.model, tensors={"w": torch.ones(4)})
    require_unchanged(run)


@pytest.mark.parametrize(
    "change",
    [{"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, {"format": 2}, {"config": []},
     {"plugins": [{"name": "../x.py", "sha256": "0" * 64, "choices": [], "stored": True}]}],
)  # fmt: skip
def test_a_record_that_names_other_places_is_refused(tmp_path: Path, change) -> None:
    run = made_run(tmp_path / "a")
    run.record.write_text(json.dumps(json.loads(run.record.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"run\.json: "):
        require_unchanged(run)


class Shape(Choice):
    """A family of the test."""


class Owner(Config):
    shape: Shape


def plugin_class(file: Path) -> type[Shape]:
    """Return a member of the family that ``file`` defines, as ``--use`` makes it."""
    module = ModuleType("user_file_of_test")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    return type("Round", (Shape,), {"__module__": module.__name__, "__doc__": "A member."})


def test_a_plugin_is_recorded_and_a_run_without_it_says_what_to_give(tmp_path: Path) -> None:
    file = tmp_path / "my_shapes.py"
    file.write_text("# the text\n")
    run, cls = made_run(tmp_path / "a"), plugin_class(file)
    plugins = record_plugins(Owner(shape=cls()), run.plugins)
    assert [(p.name, p.choices, p.stored) for p in plugins] == [("my_shapes.py", ("Round",), True)]
    assert (run.plugins / "my_shapes.py").read_text() == "# the text\n"
    write_run_record(run, config=read_yaml_file(run.config), plugins=plugins)
    require_plugins(run)
    file.write_text("# another text\n")
    with pytest.raises(CheckpointError, match=r"trained with another my_shapes\.py"):
        require_plugins(run)
    del Shape.members["Round"]
    with pytest.raises(CheckpointError, match=r"needs the plug-in my_shapes\.py .*trust it: --use"):
        require_plugins(run)
    (run.plugins / "my_shapes.py").unlink()
    with pytest.raises(CheckpointError, match=r"Give the file with --use; its SHA-256"):
        require_loaded(plugins, run=run.path, folder=run.plugins)
    record = read_run_record(run)
    assert record is not None
    assert record.plugins == plugins


def test_a_plugin_whose_name_no_record_may_have_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    file = tmp_path / "my shapes.py"
    file.write_text("# the text\n")
    cls = plugin_class(file)
    try:
        with pytest.raises(UserError, match=r"my shapes\.py: .*rename the file"):
            record_plugins(Owner(shape=cls()), tmp_path / "plugins")
    finally:
        del Shape.members["Round"]
    assert not (tmp_path / "plugins").exists()
