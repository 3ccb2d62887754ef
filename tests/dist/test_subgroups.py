"""A group is cut into runs, and across them."""

import pytest
import torch.distributed as distributed

from moesaic.dist.collectives import Group
from moesaic.dist.subgroups import split
from moesaic.testing.ranks import run_on_ranks


def _ranks(group: Group) -> list[int] | None:
    return None if group is None else distributed.get_process_group_ranks(group)


def _splits() -> list[tuple[list[int] | None, list[int] | None]]:
    world = distributed.group.WORLD
    pairs = split(world, run=2)
    again = split(pairs.far, run=2)  # the other pair of the world cuts itself
    parts = [split(world, run=1), pairs, split(world, run=4), again]
    return [(_ranks(part.near), _ranks(part.far)) for part in parts]


def test_runs_are_neighbours_and_their_places_are_groups() -> None:
    every = [0, 1, 2, 3]
    for rank, found in enumerate(run_on_ranks(4, _splits)):
        run, place = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert found == [(None, every), (run, place), (every, None), (place, None)]


def test_runs_come_out_even() -> None:
    with pytest.raises(ValueError, match="1 ranks cannot be cut into runs of 2"):
        split(None, run=2)
