"""Stores bring tensors from every tier alike, count what moves, and freeze a generation."""

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.memory.disk_store import DiskFullError, DiskStore
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tensor_store import Access, Part, Place, TensorStore
from moesaic.memory.tier import DeviceMemory, DiskStorage, HostMemory, Tier

CPU = torch.device("cpu")
TIERS = (DeviceMemory(), HostMemory(), DiskStorage())


@pytest.fixture(params=TIERS, ids=lambda tier: type(tier).__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TensorStore:
    tier: Tier = request.param
    if isinstance(tier, DiskStorage):
        tier = DiskStorage(folder=str(tmp_path / "tier"))
    opened = tier.open(device=CPU, label="test", in_flight_bytes=4096)
    opened.allocate("a", (4, 3), torch.float32)
    opened.allocate("b", (5,), torch.bfloat16)
    opened.allocate("empty", (0, 3), torch.float32)
    return opened


def update(store: TensorStore, part: Part, value: float) -> None:
    with store.fetch([part], access=Access.UPDATE) as (tensor,):
        tensor.add_(value)


def content(store: TensorStore, name: str) -> torch.Tensor:
    with store.fetch([Part(name)], access=Access.READ) as (tensor,):
        return tensor.clone()


def test_a_tensor_starts_as_zeros_and_keeps_what_is_given_back(store: TensorStore) -> None:
    assert not content(store, "a").any()
    update(store, Part("a", 1, 3), 2.0)
    update(store, Part("b"), 1.0)
    expected = torch.tensor([0.0, 2, 2, 0])[:, None].expand(4, 3)
    assert torch.equal(content(store, "a"), expected)
    assert torch.equal(store.live("a"), expected)
    assert torch.equal(content(store, "b"), torch.ones(5, dtype=torch.bfloat16))
    assert content(store, "empty").shape == (0, 3)
    store.close()


def test_an_update_after_a_freeze_leaves_the_frozen_tensors_as_they_were(
    store: TensorStore,
) -> None:
    update(store, Part("a"), 1.0)
    frozen = store.freeze()
    update(store, Part("a", 0, 2), 5.0)
    store.live("b").fill_(3)
    assert torch.equal(frozen["a"], torch.ones(4, 3))
    assert not frozen["b"].any()
    assert content(store, "a")[0, 0] == 6
    kept = frozen["a"]
    del frozen
    gc.collect()
    update(store, Part("a"), 1.0)
    store.close()
    assert torch.equal(kept, torch.ones(4, 3))


def test_what_moves_is_counted_by_place(store: TensorStore, tmp_path: Path) -> None:
    expected = {"DeviceStore": (0, 64), "HostStore": (64, 0), "DiskStore": (64, 64)}
    for place, num_bytes in zip(Place, expected[type(store).__name__], strict=True):
        moved = store.moved.fetched, store.moved.written
        with store.fetch([Part("a"), Part("b", 1, 3)], access=Access.UPDATE, place=place):
            pass
        assert store.moved.written - moved[1] == min(num_bytes, 52)
        assert store.moved.fetched - moved[0] == min(num_bytes, 52)
    with store.fetch([Part("a")], access=Access.READ):
        pass
    assert store.moved.written in (52, 104)
    store.close()
    assert not list(tmp_path.rglob("*.bin"))


def test_rows_that_a_tensor_does_not_have_are_refused(store: TensorStore) -> None:
    with pytest.raises(ValueError, match="4 rows"):
        store.fetch([Part("a", 2, 5)], access=Access.READ)
    with pytest.raises(ValueError, match="stored already"):
        store.allocate("a", (1,), torch.float32)


def disk(tmp_path: Path, *, in_flight_bytes: int) -> DiskStore:
    store = DiskStorage(folder=str(tmp_path)).open(
        device=CPU, label="states", in_flight_bytes=in_flight_bytes
    )
    assert isinstance(store, DiskStore)
    for number in range(4):
        store.allocate(f"t{number}", (64,), torch.float32)
    return store


def test_buffers_of_a_disk_stay_within_their_bound(tmp_path: Path) -> None:
    store = disk(tmp_path, in_flight_bytes=600)
    for number in (0, 1, 2, 3, 0, 1):
        update(store, Part(f"t{number}"), 1.0)
    assert [float(content(store, f"t{n}")[5]) for n in range(4)] == [2, 2, 1, 1]
    assert store.peak_in_flight <= 600
    with (
        store.fetch([Part("t0"), Part("t1")], access=Access.READ),
        pytest.raises(RuntimeError, match="over the bound of 600"),
    ):
        store.fetch([Part("t2")], access=Access.READ)
    store.close()


def test_a_file_grows_when_a_tensor_is_first_updated(tmp_path: Path) -> None:
    store = disk(tmp_path, in_flight_bytes=2**20)
    file = store._chunks[0].file  # pyright: ignore[reportAttributeAccessIssue]
    assert os.fstat(file).st_blocks == 0
    update(store, Part("t1"), 1.0)
    store.synchronize()
    assert 0 < os.fstat(file).st_blocks * 512 < 2**16
    store.close()


def test_reserved_room_is_in_the_file_that_is_then_written(tmp_path: Path) -> None:
    def blocks() -> int:
        return os.fstat(store._chunks[0].file).st_blocks  # pyright: ignore[reportAttributeAccessIssue]

    store = disk(tmp_path, in_flight_bytes=2**20)
    store.allocate("large", (2**16,), torch.float32)
    kept = store.freeze()
    store.reserve([Part("large")])
    assert blocks() * 512 >= 2**18
    assert not kept["large"].any()
    store.close()
    store.allocate("large", (2**16,), torch.float32)
    assert blocks() == 0
    store.reserve([Part("large")])
    assert blocks() * 512 >= 2**18
    store.close()


def test_a_full_disk_is_met_before_anything_changes_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = disk(tmp_path, in_flight_bytes=2**20)
    update(store, Part("t0"), 1.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    update(store, Part("t0"), 1.0)  # its blocks are there
    with pytest.raises(
        DiskFullError, match=rf"{tmp_path}/moesaic-.*states-0.bin: no room"
    ) as error:
        store.fetch([Part("t0"), Part("t1")], access=Access.UPDATE)
    assert "256 B" in str(error.value)
    assert float(content(store, "t0")[0]) == 2
    store.close()


def test_a_file_that_may_not_be_so_large_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", limited)
    with pytest.raises(DiskFullError, match=r"moesaic-.*0.bin: no room for .*ulimit -f"):
        disk(tmp_path, in_flight_bytes=2**20)


def test_a_folder_where_no_file_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"taken/moesaic-.*0.bin: .*cannot be made .*name a folder"):
        disk(tmp_path / "taken", in_flight_bytes=2**20)


def test_gradients_or_states_away_are_offloading() -> None:
    assert not MemoryPlan().offloads
    assert not MemoryPlan(parameters=HostMemory()).offloads
    assert MemoryPlan(optimizer_states=DiskStorage()).offloads
