import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_samples import FORMS, snapshot, written
from safetensors import safe_open
from test_full_checkpoint_save import FullDisk, QuickDisk, same

from moesaic.checkpoint.full_checkpoint import load_checkpoint, save_checkpoint
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.reshard import FullForm, ShardedForm, reshard
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.core.errors import CheckpointError


def content(path):
    """Every file but the manifest, which has the serial number of its root."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_content(tmp_path, form):
    path = written(tmp_path, form)
    found = load_checkpoint(path)
    assert same(found, snapshot())
    assert (found.expert_parameters, found.plan) == (snapshot().expert_parameters, snapshot().plan)


def test_there_and_back_gives_the_same_bytes(tmp_path):
    whole = save_checkpoint(tmp_path / "whole", snapshot())
    three = reshard(whole, root=tmp_path / "three", form=ShardedForm(3))
    two = reshard(three, root=tmp_path / "two", form=ShardedForm(2))
    back = reshard(two, root=tmp_path / "back", form=FullForm())
    assert content(back) == content(whole)
    assert content(reshard(back, root=tmp_path / "again", form=ShardedForm(3))) == content(three)
    assert content(reshard(two, root=tmp_path / "once more", form=ShardedForm(3))) == content(three)
    assert read_manifest(back).files == read_manifest(whole).files


def test_an_expert_is_stored_under_its_global_number(tmp_path):
    path = written(tmp_path, "three shards")
    for expert in range(4):
        for kind, name in (("model", "up"), ("optimizer", "m/up")):
            (line,) = (
                (file, key)
                for file in path.glob("*.safetensors")
                for key in keys(file)
                if key == f"{kind}/{name}/expert-{expert:04d}"
            )
            with safe_open(line[0], framework="pt") as opened:
                held = opened.get_tensor(line[1])
            assert torch.equal(held, snapshot().files[kind][name][expert])


def keys(file):
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def test_shards_are_of_about_one_size(tmp_path):
    tensors = {f"w{n}": torch.zeros(100 + n) for n in range(30)}
    path = save_checkpoint(tmp_path / "a", Snapshot(1, {"model": tensors}))
    cut = reshard(path, root=tmp_path / "b", form=ShardedForm(4))
    sizes = [p.stat().st_size for p in cut.glob("shard-*")]
    assert len(sizes) == 4
    assert max(sizes) < 1.25 * min(sizes)


def test_a_damaged_source_writes_nothing(tmp_path):
    path = written(tmp_path, "three shards")
    file = path / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors is truncated"):
        reshard(path, root=tmp_path / "out", form=FullForm())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_written_over_itself(tmp_path):
    path = save_checkpoint(tmp_path, snapshot())
    with pytest.raises(CheckpointError, match="expected another directory"):
        reshard(path, root=tmp_path, form=ShardedForm(2))


@pytest.mark.parametrize("form", [FullForm(), ShardedForm(2)], ids=["whole", "shards"])
def test_a_full_disk_leaves_nothing(tmp_path, form):
    path = written(tmp_path, "three shards")
    with pytest.raises(CheckpointError, match="disk is full"):
        reshard(path, root=tmp_path / "out", form=form, disk=FullDisk(300))
    assert list((tmp_path / "out").iterdir()) == []


class Watching(QuickDisk):
    """Writes piece by piece and looks at the memory that is not a mapped file."""

    def __init__(self):
        self.most = 0

    def write(self, path, *, chunks):
        with path.open("wb") as stream:
            for piece in chunks:
                stream.write(piece)
                self.most = max(self.most, anonymous_bytes())


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(s.split()[1]) for s in status.splitlines() if s.startswith("RssAnon"))


def memory_of_resharding(path, root, form):
    """In a process of its own, where nothing else allocates."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        found = os.read(read, 100)
        os.waitpid(child, 0)
        return json.loads(found)
    before, disk = anonymous_bytes(), Watching()
    reshard(path, root=root, form=form, disk=disk)
    os.write(write, json.dumps(disk.most - before).encode())
    os._exit(0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    megabyte = 1 << 20
    tensors = {f"w{n:02d}": torch.full((megabyte // 4,), float(n)) for n in range(24)}
    experts = {"up": torch.arange(8.0).repeat_interleave(megabyte // 4).view(8, 512, 512)}
    made = Snapshot(1, {"model": tensors | experts}, expert_parameters={"up": 8})
    path = save_checkpoint(tmp_path / "whole", made, disk=QuickDisk())
    cut = reshard(path, root=tmp_path / "cut", form=ShardedForm(3), disk=QuickDisk())
    for source, form in ((path, ShardedForm(2)), (cut, FullForm()), (cut, ShardedForm(5))):
        most = memory_of_resharding(source, tmp_path / f"out-{source.parent.name}-{form}", form)
        assert most < 12 * megabyte  # the experts has 8, all of them 32
