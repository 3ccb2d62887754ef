import hashlib
import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from test_full_checkpoint_save import same, snapshot

from moesaic.checkpoint.full_checkpoint import (
    find_latest_checkpoint,
    load_checkpoint,
    read_weights,
    save_checkpoint,
)
from moesaic.checkpoint.manifest import MANIFEST_FILE, read_manifest
from moesaic.checkpoint.reshard import ShardedForm, reshard
from moesaic.checkpoint.safetensors_io import FORMAT_KEY, write_tensors
from moesaic.checkpoint.snapshot import Snapshot
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
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest"):
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
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: a pickle with the name .* rejected"
    ):
        load_checkpoint(path.parent)
    assert "pickle" in find_latest_checkpoint(root).skipped[0]


def test_a_missing_checkpoint_names_those_that_are_there(root):
    with pytest.raises(CheckpointError, match="has step-00000002, step-00000001"):
        load_checkpoint(root / "step-00000009")


def test_a_root_without_checkpoints_is_an_error(tmp_path):
    assert find_latest_checkpoint(tmp_path).path is None
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("form", [None, ShardedForm(2)], ids=["full", "sharded"])
def test_a_checkpoint_of_format_1_is_read_with_the_names_of_now(tmp_path, form):
    old = {
        "encoder.0.beside.always.up.weight": torch.ones(2),
        "encoder.0.router.heard": torch.ones(3),
    }
    experts = {"encoder.0.exchange.experts": torch.arange(8.0).view(4, 2)}
    model = old | experts
    optimizer = {f"m/{name}": tensor for name, tensor in model.items()}
    state = {"config": {"schedule": {"shape": {"kind": "Linear"}}}}
    snapshot = Snapshot(
        3, {"model": model, "optimizer": optimizer}, state, dict.fromkeys(experts, 4)
    )
    path = save_checkpoint(tmp_path / "full", snapshot)
    if form is not None:
        path = reshard(path, root=tmp_path / "sharded", form=form)
    body = json.loads((path / MANIFEST_FILE).read_text())
    body |= {"format": 1, "banks": body.pop("expert_parameters")}
    del body["digest"]
    body["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST_FILE).write_text(json.dumps(body))
    names = {
        "encoder.0.shared_experts.feed_forward.up.weight",
        "encoder.0.router.stats_sum",
        "encoder.0.dispatch_projection.experts",
    }
    for found in (
        load_checkpoint(path),
        load_checkpoint(reshard(path, root=tmp_path / "again", form=ShardedForm(3))),
    ):
        assert set(found.files["model"]) == set(read_weights(path)) == names
        assert set(found.files["optimizer"]) == {f"m/{name}" for name in names}
        assert found.expert_parameters == {"encoder.0.dispatch_projection.experts": 4}
        assert found.state["config"] == {"schedule": {"shape": {"kind": "LinearDecay"}}}


@pytest.mark.parametrize("form", [None, ShardedForm(2)], ids=["full", "sharded"])
def test_heads_of_format_2_are_read_with_the_names_of_now(tmp_path, form):
    heads = {"head.classes.linear.weight": torch.ones(2), "head.classes.linear.bias": torch.ones(1)}
    files = {"model": heads, "optimizer": {f"m/{name}": tensor for name, tensor in heads.items()}}
    path = save_checkpoint(tmp_path / "full", Snapshot(3, files))
    if form is not None:
        path = reshard(path, root=tmp_path / "sharded", form=form)
    assert set(read_weights(path)) == set(heads)  # of a plug-in, in the present format
    older = read_manifest(path).model_copy(update={"format": 2})
    (path / MANIFEST_FILE).write_text(older.to_json())
    names = {"head.projection.linear.weight", "head.projection.linear.bias"}
    found = load_checkpoint(path).files
    assert found["model"].keys() == names
    assert found["optimizer"].keys() == {f"m/{name}" for name in names}
    save_file({"head.patch.linear.bias": torch.ones(1)}, tmp_path / "x", {FORMAT_KEY: "2"})
    assert set(read_weights(tmp_path / "x")) == {"head.projection.linear.bias"}


def test_weights_of_an_older_export_are_read_with_the_names_of_now(tmp_path):
    save_file({"decoder.0.entry.weight": torch.ones(2)}, tmp_path / "old.safetensors")
    assert set(read_weights(tmp_path / "old.safetensors")) == {"decoder.0.input_norm.weight"}
    write_tensors(tmp_path / "new.safetensors", tensors={"a.entry.weight": torch.ones(2)})
    assert set(read_weights(tmp_path / "new.safetensors")) == {"a.entry.weight"}
