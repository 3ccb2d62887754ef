"""Law: what some ranks saved in one layout, any number of ranks load in any other, bit for bit."""

from functools import partial
from pathlib import Path

import torch
from checkpoint_samples import save_sharded
from random_shards import (
    FullTensors,
    fill_with_sentinel,
    mismatched_tensors,
    random_shards,
)

from moesaic.checkpoint.checkpoint_directory import RetentionPolicy
from moesaic.checkpoint.full_checkpoint import load_checkpoint, save_checkpoint
from moesaic.checkpoint.reshard import ShardedForm, reshard
from moesaic.checkpoint.sharded_checkpoint import CheckpointSaver, load_sharded
from moesaic.checkpoint.snapshot import RankSnapshot, Snapshot
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess

BANKS = {"experts.up": 6, "experts.bias": 6}
LAYOUTS = 8


def wholes(step: int) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(step)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    model = {
        "experts.up": some(6, 4, 5),
        "experts.bias": some(6, 3),
        "dense": some(7, 9),
        "half": some(11).bfloat16(),
        "cube": some(3, 4, 5),
        "empty": some(0, 3),
        "bias_of_the_router": some(6),
    }
    slots = {f"exp_avg/{name}": 2 * tensor for name, tensor in model.items()}
    steps = {f"step/{name}": some() for name in model}
    return {"model": model, "optimizer": slots | steps, "random": {"0/cpu": torch.arange(9)}}


def held(step: int, *, seed: int, rank: int, world: int) -> RankSnapshot:
    files = random_shards(
        wholes(step), seed=seed, rank=rank, world_size=world, expert_tensors=BANKS
    )
    return RankSnapshot(step, files, {"step": step}, BANKS, {"seed": seed})


def save_in(root: Path) -> None:
    world = ProcessGroupWorld()
    for seed in range(LAYOUTS):
        snapshot = held(seed, seed=seed, rank=world.rank, world=world.size)
        save_sharded(root, snapshot, world=world, retention=RetentionPolicy(LAYOUTS))


def wrong_after_loading(root: Path) -> list[str]:
    world = SingleProcess() if not torch.distributed.is_initialized() else ProcessGroupWorld()
    found = []
    for seed in range(LAYOUTS):
        whole: FullTensors = wholes(seed)
        other = random_shards(
            whole, seed=seed + 100, rank=world.rank, world_size=world.size, expert_tensors=BANKS
        )
        into = fill_with_sentinel(other)
        state = load_sharded(root / f"step-{seed:08d}", into=into, world=world)
        found += [] if state == {"step": seed} else [f"state {state}"]
        found += mismatched_tensors(into, full_tensors=whole)
    return found


def test_four_ranks_save_and_one_two_and_eight_load_in_other_layouts(tmp_path: Path) -> None:
    run_on_ranks(4, partial(save_in, tmp_path))
    assert wrong_after_loading(tmp_path) == []
    for world in (2, 8):
        assert run_on_ranks(world, partial(wrong_after_loading, tmp_path)) == [[]] * world
    for seed in range(LAYOUTS):
        found = load_checkpoint(tmp_path / f"step-{seed:08d}")
        assert list(mismatched_tensors(found.files, full_tensors=wholes(seed))) == []
        assert found.files.keys() == wholes(seed).keys()
        assert (found.step, found.state, found.expert_parameters) == (seed, {"step": seed}, BANKS)
    path = tmp_path / "step-00000003"  # its experts lie in several blocks each
    again = load_checkpoint(reshard(path, root=tmp_path / "again", form=ShardedForm(2)))
    assert list(mismatched_tensors(again.files, full_tensors=wholes(3))) == []


def test_ranks_load_what_one_process_saved_whole(tmp_path: Path) -> None:
    for seed in range(LAYOUTS):
        save_checkpoint(tmp_path, Snapshot(seed, wholes(seed), {"step": seed}), keep=LAYOUTS)
    assert run_on_ranks(2, partial(wrong_after_loading, tmp_path)) == [[]] * 2


def in_turn(root: Path) -> list[str]:
    """Save by both ways while the tensors go on changing."""
    world = ProcessGroupWorld()
    saver = CheckpointSaver(root / "later", world=world, timeout_s=60)
    for step in range(5):
        snapshot = held(step, seed=step, rank=world.rank, world=world.size)
        save_sharded(root / "now", snapshot, world=world, retention=RetentionPolicy(9))
        saver.save_async(snapshot, retention=RetentionPolicy(9))
        fill_with_sentinel(snapshot.files)
        snapshot.state["step"] = "changed"
    last = saver.wait()
    assert last == root / "later" / "step-00000004"
    saver.close()
    return []


def test_what_is_saved_in_the_background_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    run_on_ranks(3, partial(in_turn, tmp_path))
    for path in sorted((tmp_path / "now").glob("step-*")):
        for file in path.iterdir():
            if file.name != "manifest.json":  # it has the same hashes, and the serial number
                assert (
                    file.read_bytes() == (tmp_path / "later" / path.name / file.name).read_bytes()
                )
    assert len(list((tmp_path / "later").glob("step-*"))) == 5
