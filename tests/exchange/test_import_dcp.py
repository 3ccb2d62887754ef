"""Distributed checkpoints of torch: imported as safetensors are, and no pickle runs."""

import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as dcp
from hf_directories import MIXTRAL_CONFIG, mixtral_shapes, random_tensors, write_directory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moesaic.checkpoint.safetensors_io import read_tensors
from moesaic.core.errors import CheckpointError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.exchange.dcp_files import read_metadata
from moesaic.exchange.import_model import import_model


@pytest.fixture
def plain(tmp_path):
    """The tensors of a model, what import makes of them, and a place for the same as DCP."""
    tensors = random_tensors(mixtral_shapes("fused"))
    import_model(write_directory(tmp_path / "theirs", tensors), out=tmp_path / "ours")
    path = tmp_path / "dcp"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MIXTRAL_CONFIG))
    return tensors, read_tensors(tmp_path / "ours/model.safetensors"), path


def assert_imported(path, wanted, *, drop=()):
    found = import_model(path, out=path.parent / "again", drop=drop)
    tensors = read_tensors(path.parent / "again/model.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(tensors[name].equal(tensor) for name, tensor in wanted.items())
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_distributed_checkpoint_is_imported_as_its_safetensors_are(plain, wrapped):
    tensors, wanted, path = plain
    model = {"model": tensors} if wrapped else tensors
    state = {**model, "optimizer": {"exp_avg": torch.ones(3)}, "train_state": {"step": 3}}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    found = assert_imported(path, wanted)
    assert any("optimizer, train_state.step" in note for note in found.notes)


def test_a_checkpoint_of_two_ranks_is_put_together(plain):
    tensors, wanted, path = plain

    def save():
        mesh = init_device_mesh("cpu", (2,))
        dims = {name: int("q_proj" in name or "down_proj" in name) for name in tensors}
        state = {
            name: distribute_tensor(tensor, mesh, [Shard(dims[name])])
            for name, tensor in tensors.items()
        }
        dcp.save(state, checkpoint_id=path, process_group=distributed.group.WORLD)

    run_on_ranks(2, save)
    assert len(list(path.glob("*.distcp"))) == 2
    assert_imported(path, wanted)


def test_every_tensor_of_a_distributed_checkpoint_is_accounted_for(plain):
    tensors, _, path = plain
    del tensors["model.norm.weight"]
    dcp.save(tensors | {"extra": torch.ones(2)}, checkpoint_id=path, no_dist=True)
    with pytest.raises(CheckpointError, match=r"extra \| is unexp(.|\n)*") as caught:
        import_model(path, out=path.parent / "again")
    assert "model.norm.weight | is missing" in str(caught.value)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json.*hf_assets_path"):
        import_model(path, out=path.parent / "again")
    assert not (path.parent / "again").exists()


class Harmful:
    """Makes the file ``path`` when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_harmful_pickle_is_refused_by_name_and_does_not_run(plain):
    tensors, _, path = plain
    dcp.save(tensors, checkpoint_id=path, no_dist=True)
    harm, files = (
        path.parent / "harm",
        {name: path / name for name in (".metadata", "__0_0.distcp")},
    )
    good = shutil.copy(files[".metadata"], path.parent / "good")
    files[".metadata"].write_bytes(pickle.dumps(Harmful(harm)))
    with pytest.raises(CheckpointError, match=r"it names (posix|nt)\.mkdir.*nothing of it was run"):
        import_model(path, out=path.parent / "again")
    shutil.copy(good, files[".metadata"])
    files["__0_0.distcp"].write_bytes(pickle.dumps(Harmful(harm)) + bytes(100_000))
    with pytest.raises(CheckpointError, match="no tensor at byte"):
        import_model(path, out=path.parent / "again")
    assert not harm.exists()


def test_keys_whose_hash_takes_forever_are_refused(plain):
    _, _, path = plain
    doubled = b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60))  # a pair of itself
    (path / ".metadata").write_bytes(b"\x80\x04})" + doubled + b"K\x01s.")
    with pytest.raises(CheckpointError, match="a key is a tuple"):
        import_model(path, out=path.parent / "again")


def test_what_is_no_chunk_of_a_tensor_is_named(plain):
    _, _, path = plain
    rows = torch.arange(6.0).view(2, 3)
    dcp.save({"rows": rows}, checkpoint_id=path, no_dist=True)
    stored = pickle.loads((path / ".metadata").read_bytes())
    [place] = stored.storage_data.values()
    torch.save(rows, path / "old", _use_new_zipfile_serialization=False)
    place.relative_path, place.offset, place.length = "old", 0, (path / "old").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(stored))
    with pytest.raises(CheckpointError, match="at byte 0 no tensor in a zip file"):
        read_metadata(path)[0]["rows"].read((0, 0), (2, 3))
    dcp.save({"rows": rows}, checkpoint_id=path, no_dist=True)
    stored = pickle.loads((path / ".metadata").read_bytes())
    stored.state_dict_metadata["rows"].size = torch.Size([4, 3])
    stored.state_dict_metadata["rows"].chunks *= 2
    (path / ".metadata").write_bytes(pickle.dumps(stored))
    with pytest.raises(CheckpointError, match="chunks of a tensor are missing"):
        read_metadata(path)[0]["rows"].read((0, 0), (4, 3))
