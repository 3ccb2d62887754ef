import errno
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_samples import FORMS, save_sharded, snapshot, written
from test_full_checkpoint_save import QuickDisk

from moesaic.checkpoint.checkpoint_directory import RetentionPolicy
from moesaic.checkpoint.full_checkpoint import find_latest_checkpoint, load_checkpoint
from moesaic.checkpoint.sharded_checkpoint import CheckpointSaver, load_sharded, load_verified
from moesaic.checkpoint.snapshot import RankSnapshot, Shard, ShardBlock
from moesaic.checkpoint.tensor_reader import TensorReader
from moesaic.core.errors import CheckpointError
from moesaic.distributed.forked_ranks import RankError, run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World

KEEP = RetentionPolicy(2)
EXPERT_PARAMETERS = {"up": 4}


def share(step: int, world: World) -> RankSnapshot:
    """Half of the experts and half of the rows for each of two ranks; all of it for one."""
    n, r = 4 // world.size, world.rank
    up = torch.arange(4 * 6.0).view(4, 2, 3)[n * r : n * (r + 1)] + step
    dense = torch.arange(4 * 5.0).view(4, 5)[n * r : n * (r + 1)] - step
    model = {
        "up": Shard.from_block(up, offset=(n * r, 0, 0), shape=(4, 2, 3)),
        "dense": Shard.from_block(dense, offset=(n * r, 0), shape=(4, 5)),
        "norm": torch.full((3,), float(step)),
    }
    return RankSnapshot(
        step, {"model": model}, {"step": step}, EXPERT_PARAMETERS, {"expert": world.size}
    )


def is_step(found, step: int) -> bool:
    model = found.files["model"]
    return (
        found.step == step
        and found.state == {"step": step}
        and torch.equal(model["up"], torch.arange(4 * 6.0).view(4, 2, 3) + step)
        and torch.equal(model["dense"], torch.arange(4 * 5.0).view(4, 5) - step)
        and torch.equal(model["norm"], torch.full((3,), float(step)))
    )


class Dying(QuickDisk):
    """Sends its process a SIGKILL at the n-th operation, after half of a write."""

    def __init__(self, operations: int) -> None:
        self.left = operations

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def make_dir(self, path):
        self._live()
        super().make_dir(path)

    def write(self, path, *, chunks):
        whole = b"".join(bytes(p) for p in chunks)
        if self.left == 0:
            path.write_bytes(whole[: len(whole) // 2])
        self._live()
        super().write(path, chunks=[whole])

    def rename(self, old, *, new):
        self._live()
        super().rename(old, new=new)

    def sync_dir(self, path):  # noqa: ARG002
        self._live()

    def remove(self, path):
        self._live()
        super().remove(path)


def save_and_die(root: Path, victim: int, moment: int) -> None:
    world = ProcessGroupWorld()
    disk = Dying(moment) if world.rank == victim else QuickDisk()
    save_sharded(root, share(9, world), world=world, retention=KEEP, disk=disk)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_time_during_a_save_leaves_a_complete_checkpoint(tmp_path, victim):
    kills = 0
    for moment in range(40):
        root = tmp_path / str(moment)
        for step in (1, 2):
            save_sharded(
                root,
                share(step, SingleProcess()),
                world=SingleProcess(),
                retention=KEEP,
                disk=QuickDisk(),
            )
        try:
            run_on_ranks(2, partial(save_and_die, root, victim, moment))
            break
        except RankError:
            kills += 1
        found = load_checkpoint(root)
        assert is_step(found, found.step)
        assert found.step in (2, 9)
        assert find_latest_checkpoint(root).skipped == ()
        save_sharded(
            root, share(4, SingleProcess()), world=SingleProcess(), retention=KEEP, disk=QuickDisk()
        )
        assert is_step(load_checkpoint(root), 4)
        assert not [p.name for p in root.iterdir() if p.name.startswith(".")]
    assert kills >= (1 if victim else 13)
    assert is_step(load_checkpoint(root), 9)


class Refusing(QuickDisk):
    """Has no room for the n-th file it is to write."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def write(self, path, *, chunks):
        self.left -= 1
        if self.left < 0:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, chunks=chunks)


def save_on_full_disks(root: Path) -> list[str]:
    world = ProcessGroupWorld()
    save_sharded(root, share(1, world), world=world, disk=QuickDisk())
    messages = []
    for victim, writes in ((0, 0), (1, 0), (0, 1), (0, 2), (0, 3)):
        disk = Refusing(writes) if world.rank == victim else QuickDisk()
        try:
            save_sharded(root, share(2, world), world=world, disk=disk)
            messages.append("saved")
        except CheckpointError as error:
            messages.append(str(error))
        world.barrier()
        if world.rank == 0:
            messages.append(" ".join(sorted(p.name for p in root.iterdir())))
        world.barrier()
    return messages


def test_a_full_disk_on_one_rank_is_raised_on_all_and_loses_nothing(tmp_path):
    first, second = run_on_ranks(2, partial(save_on_full_disks, tmp_path))
    assert second == first[::2]
    for victim, text in zip((0, 1, 0, 0, 0), second, strict=True):
        assert f"saving failed on rank {victim}, the disk is full: needed 1.00 MiB" in text
        assert "Earlier checkpoints are intact" in text
    assert set(first[1::2]) == {"latest step-00000001"}
    assert is_step(load_checkpoint(tmp_path), 1)


class Elsewhere(QuickDisk):
    """The disk of a machine that does not share its directory."""

    def write(self, path, *, chunks):
        del path, chunks


def save_on_two_machines(root: Path) -> str:
    world = ProcessGroupWorld()
    disk = Elsewhere() if world.rank else QuickDisk()
    with pytest.raises(CheckpointError) as caught:
        save_sharded(root, share(2, world), world=world, disk=disk)
    return str(caught.value)


def test_a_directory_that_is_not_shared_is_an_error_and_nothing_is_published(tmp_path):
    messages = run_on_ranks(2, partial(save_on_two_machines, tmp_path))
    assert messages[0] == messages[1]
    assert "shard-00001.safetensors: written by its rank but not visible to rank 0" in messages[0]
    assert list(tmp_path.iterdir()) == []


def background(root: Path) -> list[str]:
    world = ProcessGroupWorld()
    disk = Refusing(1) if world.rank == 1 else QuickDisk()
    saver = CheckpointSaver(root, world=world, timeout_s=60, disk=disk)
    messages = []
    for step in range(1, 4):
        saver.save_async(share(step, world), retention=KEEP)
        while True:  # steps of training, alike on all ranks
            try:
                if path := saver.poll():
                    messages.append(path.name)
                    break
            except CheckpointError as error:
                messages.append(str(error))
                break
    saver.close()
    return messages


def test_an_error_in_the_background_is_raised_by_the_next_poll_of_every_rank(tmp_path):
    messages = run_on_ranks(2, partial(background, tmp_path))
    assert messages[0] == messages[1]
    assert messages[0][0] == "step-00000001"
    assert len(messages[0]) == 3
    assert all("saving failed on rank 1, the disk is full" in text for text in messages[0][1:])
    assert is_step(load_checkpoint(tmp_path), 1)


def wrong_layouts() -> list[str]:
    world = ProcessGroupWorld()
    r, whole = world.rank, torch.zeros(4, 2)
    cases = {
        "a hole": Shard.from_block(whole[:1], offset=(2 * r, 0), shape=(4, 2)),
        "an overlap": Shard.from_block(whole[:3], offset=(r, 0), shape=(4, 2)),
        "two lengths": Shard.from_block(whole[: 2 + r], offset=(0, 0), shape=(4, 2)),
        "two shapes": Shard((4, 2 + r), torch.float32, ()),
        "nobody": Shard((4, 2), torch.float32, ()),
        "a lost expert": Shard.from_block(whole[: 2 - r, :], offset=(2 * r, 0), shape=(4, 2)),
    }
    messages = []
    for name, held in cases.items():
        expert_parameters = {"w": 4} if name == "a lost expert" else {}
        snapshot = RankSnapshot(1, {"model": {"w": held}}, {}, expert_parameters)
        try:
            save_sharded(Path("never"), snapshot, world=world)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_shards_that_do_not_make_up_a_tensor_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first, second = run_on_ranks(2, wrong_layouts)
    assert first == second
    hole, overlap, lengths, shapes, nobody, lost = first
    assert "model/w: it is covered for 4 of 8 values" in hole
    assert "model/w: [3, 2] at [0, 0]" in overlap
    assert "overlap" in overlap
    assert "model/w: blocks at [0, 0] differ, [2, 2] on rank 0 and [3, 2] on rank 1" in lengths
    assert "model/w is torch.float32 [4, 2] on rank 0 but torch.float32 [4, 3] on rank 1" in shapes
    assert "model/w: it is missing" in nobody
    assert "model/w: expert 3 is missing" in lost
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path):
    def make(root):
        return str(
            save_sharded(
                root, share(3, ProcessGroupWorld()), world=ProcessGroupWorld(), disk=QuickDisk()
            )
        )

    return Path(run_on_ranks(2, partial(make, tmp_path))[0])


def room(**changes):
    up, dense = torch.zeros(4, 2, 3), torch.zeros(4, 5)
    return {"model": {"up": up, "dense": dense, "norm": torch.zeros(3)} | changes}


def test_one_process_loads_in_place_what_two_ranks_saved(saved):
    into = room()
    assert load_sharded(saved, into=into, world=SingleProcess()) == {"step": 3}
    assert torch.equal(into["model"]["up"], torch.arange(4 * 6.0).view(4, 2, 3) + 3)
    assert is_step(load_checkpoint(saved), 3)


MISFITS = {
    "is not in it": {"other": torch.zeros(2)},
    r"torch.float32 \[4, 5\] in it, expected torch.float32 \[5, 4\]": {"dense": torch.zeros(5, 4)},
    r"torch.float32 \[3\] in it, expected torch.int64 \[3\]": {
        "norm": torch.zeros(3, dtype=torch.int64)
    },
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(saved, message):
    into = room(**MISFITS[message])
    with pytest.raises(CheckpointError, match=f"the checkpoint does not fit: .*{message}"):
        load_sharded(saved, into=into, world=SingleProcess())
    assert not into["model"]["up"].any()


def test_a_tensor_that_is_in_no_model_is_named(saved):
    into = room()
    del into["model"]["norm"]
    with pytest.raises(
        CheckpointError, match="model/norm is in it, but not in the model of any rank"
    ):
        load_sharded(saved, into=into, world=SingleProcess())


def test_kinds_of_files_that_are_not_asked_for_are_left(saved):
    assert load_sharded(saved, into={}, world=SingleProcess()) == {"step": 3}


def errors_of_loading(path):
    world = ProcessGroupWorld()
    with pytest.raises(CheckpointError) as caught:
        load_sharded(path, into=room(), world=world)
    return str(caught.value)


def test_an_altered_shard_is_named_on_every_rank(saved):
    path = saved / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    messages = run_on_ranks(3, partial(errors_of_loading, saved))
    assert len(set(messages)) == 1
    assert "shard-00001.safetensors was altered" in messages[0]
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors was altered"):
        load_checkpoint(saved)
    path.unlink()
    assert (
        "shard-00001.safetensors is missing"
        in run_on_ranks(1, partial(errors_of_loading, saved))[0]
    )


def test_a_copy_is_written_once_and_the_work_is_shared(tmp_path):
    def both(root):
        world = ProcessGroupWorld()
        model = {f"w{n}": torch.full((8,), float(n)) for n in range(6)}
        return str(save_sharded(root, RankSnapshot(1, {"model": model}), world=world))

    path = Path(run_on_ranks(2, partial(both, tmp_path))[0])
    sizes = [(path / f"shard-0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert sizes[0] == sizes[1]
    assert all(
        torch.equal(t, torch.full((8,), float(n[1])))
        for n, t in load_checkpoint(path).files["model"].items()
    )


def test_a_block_outside_of_its_tensor_is_an_error():
    with pytest.raises(ValueError, match="is outside"):
        Shard((4,), torch.float32, (ShardBlock((3,), torch.zeros(2)),))
    with pytest.raises(ValueError, match="bfloat16"):
        Shard((4,), torch.float32, (ShardBlock((0,), torch.zeros(2).bfloat16()),))


@pytest.mark.parametrize("form", FORMS)
def test_loading_reads_the_bytes_of_the_shards_only(tmp_path, form, monkeypatch):
    whole, read, slice_of = snapshot().files["model"], [], TensorReader.read_slice
    path = written(tmp_path, form)
    half = {name: tensor[1:].clone() for name, tensor in whole.items() if len(tensor)}
    shards = {
        name: Shard.from_block(part.zero_(), offset=(1,) + (0,) * (part.dim() - 1), shape=shape)
        for name, part in half.items()
        for shape in [tuple(whole[name].shape)]
    } | {"none": whole["none"]}

    def counting(self, stored, *, block, start, shape):
        read.append(torch.Size(shape).numel() * stored.dtype.itemsize)
        return slice_of(self, stored, block=block, start=start, shape=shape)

    monkeypatch.setattr(TensorReader, "read_slice", counting)
    load_verified(path, into={"model": shards}, world=SingleProcess())
    assert sum(read) == sum(part.nbytes for part in half.values())
    assert all(torch.equal(part, whole[name][1:]) for name, part in half.items())
