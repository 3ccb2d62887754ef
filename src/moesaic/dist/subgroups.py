"""Subgroups of a group: runs of neighbours, and the ranks at one place of every run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch.distributed as distributed

from moesaic.dist.collectives import Group, rank_in, ranks_of


@dataclass(frozen=True, slots=True)
class Split:
    """``near`` are this rank's neighbours in its run, ``far`` those at its place in each run."""

    near: Group
    far: Group


def split(group: Group, *, run: int) -> Split:
    """Cut a group into runs of so many ranks. Collective over the group alone.

    Raises ValueError where the runs do not come out even.
    """
    size = ranks_of(group)
    if run < 1 or size % run:
        raise ValueError(f"{size} ranks cannot be cut into runs of {run}")
    if group is None or run == 1:
        return Split(None, group)
    if run == size:
        return Split(group, None)
    ranks = distributed.get_process_group_ranks(group)
    start, place = rank_in(group) // run * run, rank_in(group) % run
    return Split(_new(ranks[start : start + run]), _new(ranks[place::run]))


def _new(ranks: Sequence[int]) -> Group:
    # the other ranks of the world have no part in this, and need not call it
    made = distributed.new_group(list(ranks), use_local_synchronization=True)
    return cast(distributed.ProcessGroup, made)
