"""A group is split into inner and outer subgroups."""

import pytest
import torch.distributed as distributed

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.process_groups import Group, split_group


def _ranks(group: Group) -> list[int] | None:
    return None if group is None else distributed.get_process_group_ranks(group)


def _splits() -> list[tuple[list[int] | None, list[int] | None]]:
    world = distributed.group.WORLD
    pairs = split_group(world, inner_size=2)
    again = split_group(pairs.outer, inner_size=2)  # the other pair of the world cuts itself
    parts = [split_group(world, inner_size=1), pairs, split_group(world, inner_size=4), again]
    return [(_ranks(part.inner), _ranks(part.outer)) for part in parts]


def test_inner_groups_are_consecutive_and_outer_groups_strided() -> None:
    every = [0, 1, 2, 3]
    for rank, found in enumerate(run_on_ranks(4, _splits)):
        run, place = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert found == [(None, every), (run, place), (every, None), (place, None)]


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="1 ranks cannot be split into runs of 2"):
        split_group(None, inner_size=2)
