"""Initialization without torchrun, with an incomplete environment, and with torchrun."""

import pytest

from moesaic.core.errors import UserError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.initialize import init_distributed
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_the_world_is_a_single_process() -> None:
    with init_distributed(device="cpu") as world:
        assert isinstance(world, SingleProcess)
        assert (world.rank, world.size) == (0, 1)


def test_an_incomplete_environment_is_refused_with_the_missing_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        init_distributed(),
    ):
        pass


def _join_existing() -> tuple[bool, int]:
    with init_distributed(device="cpu") as world:
        inside = isinstance(world, ProcessGroupWorld)
    return inside, ProcessGroupWorld().size


def test_an_existing_group_is_used_and_not_destroyed() -> None:
    assert run_on_ranks(2, _join_existing) == [(True, 2)] * 2
