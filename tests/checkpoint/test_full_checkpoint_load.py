import pickle
import zipfile

import pytest
import torch
from test_full_checkpoint_save import same, snapshot

from moesaic.checkpoint.full_checkpoint import (
    find_latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from moesaic.core.errors import CheckpointError


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, snapshot(step))
    return tmp_path


def remove(path):
    path.unlink()
    return f"{path.name} is missing"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])
    return f"{path.name} is truncated"


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")
    return f"{path.name} is too long"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    return f"{path.name} was altered"


FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [remove, truncate, lengthen, flip])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(root, damage, name):
    path = root / "step-00000002"
    message = damage(path / name)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    found = find_latest_checkpoint(root)
    assert found.path == root / "step-00000001"
    assert len(found.skipped) == 1
    assert message in found.skipped[0]
    assert same(load_checkpoint(root), snapshot(1))


def test_every_single_flipped_byte_of_a_checkpoint_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, snapshot(1, size=1))
    for file in path.iterdir():
        whole = file.read_bytes()
        for position in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            file.write_bytes(bytes(damaged))
            with pytest.raises(CheckpointError, match=file.name):
                load_checkpoint(path)
        file.write_bytes(whole)
    assert same(load_checkpoint(path), snapshot(1, size=1))


def test_a_manifest_that_is_missing_or_damaged_is_named(root):
    path = root / "step-00000002" / "manifest.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        load_checkpoint(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing"):
        load_checkpoint(path.parent)
    assert find_latest_checkpoint(root).path == root / "step-00000001"


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def as_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def as_torch_zip(path):
    torch.save({"w": torch.ones(2)}, path)
    assert zipfile.is_zipfile(path)


@pytest.mark.parametrize("make", [as_pickle, as_torch_zip])
def test_a_pickle_inside_a_checkpoint_is_refused_and_never_run(root, make):
    path = root / "step-00000002" / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: this is a pickle .* refused"):
        load_checkpoint(path.parent)
    assert "pickle" in find_latest_checkpoint(root).skipped[0]


def test_a_missing_checkpoint_names_those_that_are_there(root):
    with pytest.raises(CheckpointError, match="has step-00000002, step-00000001"):
        load_checkpoint(root / "step-00000009")


def test_a_root_without_checkpoints_says_so(tmp_path):
    assert find_latest_checkpoint(tmp_path).path is None
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        load_checkpoint(tmp_path)
