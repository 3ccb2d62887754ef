import errno
import json
import os
import signal
import subprocess
import time

import pytest
import torch

from moesaic.checkpoint.checkpoint_directory import Disk, list_checkpoints
from moesaic.checkpoint.full_checkpoint import (
    find_latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.core.errors import CheckpointError


def snapshot(step, fill=None, size=32):
    value = float(step if fill is None else fill)
    model = {"w": torch.full((size, 8), value), "half": torch.full((3,), value).bfloat16()}
    state = {"step": step, "config": {"dim": 8}, "text": "žlutý", "loss": 0.1 + 0.2}
    return Snapshot(step, {"model": model, "optimizer": {"m/w": torch.full((4,), -value)}}, state)


def same(a, b):
    return (
        a.step == b.step
        and a.state == b.state
        and a.files.keys() == b.files.keys()
        and all(
            a.files[f].keys() == b.files[f].keys()
            and all(torch.equal(a.files[f][n], b.files[f][n]) for n in a.files[f])
            for f in a.files
        )
    )


def names(root):
    return sorted(p.name for p in root.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = save_checkpoint(tmp_path, snapshot(7))
    assert names(path) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert same(load_checkpoint(path), snapshot(7))
    assert same(load_checkpoint(tmp_path), snapshot(7))
    assert (tmp_path / "latest").read_text() == "step-00000007\n"


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, snapshot(step), keep=2, best=step == 2)
    assert names(tmp_path) == ["best", "latest", "step-00000002", "step-00000005", "step-00000006"]
    assert (tmp_path / "best").read_text() == "step-00000002\n"


def test_a_run_that_went_back_keeps_what_it_saves_now_not_its_abandoned_future(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
    save_checkpoint(tmp_path, snapshot(25), keep=2)
    assert find_latest_checkpoint(tmp_path).path == tmp_path / "step-00000025"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000025", "step-00000030"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, snapshot(3, fill=1))
    save_checkpoint(tmp_path, snapshot(3, fill=2))
    assert same(load_checkpoint(tmp_path), snapshot(3, fill=2))
    assert names(tmp_path) == ["latest", "step-00000003"]


class Killed(BaseException):
    """Not an Exception: nothing may handle a SIGKILL."""


class QuickDisk(Disk):
    """Does not wait for the medium: most of a test's time would go there."""

    def write(self, path, *, chunks):
        path.write_bytes(b"".join(bytes(p) for p in chunks))

    def sync_dir(self, path):
        pass


class DyingDisk(QuickDisk):
    """Dies during the n-th operation, after half of it where it has halves, and stays dead."""

    def __init__(self, operations):
        self.left = operations

    def _live(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def make_dir(self, path):
        self._live()
        super().make_dir(path)

    def write(self, path, *, chunks):
        whole = b"".join(bytes(p) for p in chunks)
        self._live_or_leave(lambda: path.write_bytes(whole[: len(whole) // 2]))
        super().write(path, chunks=[whole])

    def rename(self, old, *, new):
        self._live()
        super().rename(old, new=new)

    def sync_dir(self, path):  # noqa: ARG002
        self._live()

    def remove(self, path):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        self._live_or_leave(lambda: [p.unlink() for p in inside[: len(inside) // 2 + 1]])
        super().remove(path)

    def free_bytes(self, path):  # noqa: ARG002
        return 1 << 40

    def _live_or_leave(self, half):
        if self.left == 0:
            half()
        self._live()


SCENES = {"a new step": 3, "the same step": 2}


@pytest.mark.parametrize("step", SCENES.values(), ids=SCENES.keys())
def test_a_kill_at_any_operation_leaves_a_complete_checkpoint_and_the_next_save_works(
    tmp_path, step
):
    moments = 0
    for moment in range(200):
        root = tmp_path / str(moment)
        save_checkpoint(root, snapshot(1), keep=2, disk=QuickDisk())
        save_checkpoint(root, snapshot(2, fill=20), keep=2, disk=QuickDisk())
        new = snapshot(step, fill=30)
        try:
            save_checkpoint(root, new, keep=2, disk=DyingDisk(moment))
            break
        except Killed:
            moments += 1
        found = load_checkpoint(root)
        assert same(found, new) or same(found, snapshot(2, fill=20))
        assert find_latest_checkpoint(root).skipped == ()
        save_checkpoint(root, snapshot(4), keep=2, disk=QuickDisk())
        assert same(load_checkpoint(root), snapshot(4))
        assert not [n for n in names(root) if n.startswith(".")]
    assert moments >= 13
    assert same(load_checkpoint(root), new)


class FullDisk(Disk):
    """Takes ``room`` bytes and then refuses, as a full disk does: in the middle of a file."""

    def __init__(self, room, code=errno.ENOSPC):
        self.room, self.code = room, code

    def write(self, path, *, chunks):
        def passing():
            for piece in chunks:
                self.room -= len(piece)
                if self.room < 0:
                    yield bytes(piece)[: len(piece) // 2]
                    raise OSError(self.code, os.strerror(self.code))
                yield piece

        super().write(path, chunks=passing())


REFUSALS = {
    errno.ENOSPC: r"disk is full: needed 1\.\d+ MiB, free .* intact.*Free some space",
    errno.EDQUOT: r"quota is used up: needed 1\.\d+ MiB, free .* intact",
    errno.EIO: r"Input/output error.* intact.*can be written",
}


@pytest.mark.parametrize("code", REFUSALS, ids=errno.errorcode.get)
def test_a_disk_that_refuses_at_any_byte_loses_nothing(tmp_path, code):
    save_checkpoint(tmp_path, snapshot(1))
    before = names(tmp_path)
    for room in range(0, 1400, 100):
        with pytest.raises(CheckpointError, match=REFUSALS[code]):
            save_checkpoint(tmp_path, snapshot(2), disk=FullDisk(room, code))
        assert names(tmp_path) == before
        assert same(load_checkpoint(tmp_path), snapshot(1))


class SmallDisk(Disk):
    def free_bytes(self, path):  # noqa: ARG002
        return 1000


def test_too_little_space_is_reported_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"disk is full: needed 1.*free 1000 B"):
        save_checkpoint(tmp_path, snapshot(1), disk=SmallDisk())
    assert names(tmp_path) == []


@pytest.fixture
def small_mount(tmp_path):
    place = tmp_path / "mount"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("may not mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class BlindDisk(Disk):
    """Does not see the free space, so the write itself has to fail."""

    def free_bytes(self, path):  # noqa: ARG002
        return 1 << 40


@pytest.mark.parametrize("disk", [Disk(), BlindDisk()], ids=["foreseen", "met"])
def test_a_really_full_disk_loses_nothing(small_mount, disk):
    save_checkpoint(small_mount, snapshot(1))
    with pytest.raises(CheckpointError, match="disk is full"):
        save_checkpoint(small_mount, snapshot(2, size=2 << 16), disk=disk)
    assert names(small_mount) == ["latest", "step-00000001"]
    assert same(load_checkpoint(small_mount), snapshot(1))


def test_a_process_killed_while_saving_leaves_a_checkpoint_that_loads(tmp_path):
    save_checkpoint(tmp_path, snapshot(1), keep=2)
    for delay in (0.002, 0.005, 0.011, 0.02, 0.031, 0.043):
        child = os.fork()
        if child == 0:
            for step in range(2, 10_000):
                save_checkpoint(tmp_path, snapshot(step), keep=2)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = load_checkpoint(tmp_path)
        assert same(found, snapshot(found.step))


def test_the_manifest_names_versions_and_every_file(tmp_path):
    manifest = read_manifest(save_checkpoint(tmp_path, snapshot(5)))
    assert manifest.step == 5
    assert set(manifest.versions) == {"moesaic", "torch", "safetensors"}
    assert set(manifest.files) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert json.loads(manifest.to_json())["digest"]
