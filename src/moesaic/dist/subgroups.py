"""Subgroups of a group: runs of neighbours, and the ranks at one place of every run."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as distributed

from moesaic.dist.collectives import Group, rank_in, ranks_of


@dataclass(frozen=True, slots=True)
class Split:
    """``near`` are this rank's neighbours in its run, ``far`` those at its place in each run."""

    near: Group
    far: Group


def split(group: Group, *, run: int, timeout_s: float = 120.0) -> Split:
    """Cut a group into runs of so many ranks. Collective over the group alone.

    A rank that does not answer in one of them within ``timeout_s`` ends the run.

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
    wait = timedelta(seconds=timeout_s)
    near, far = _new(ranks[start : start + run], wait), _new(ranks[place::run], wait)
    return Split(near, far)


def _new(ranks: Sequence[int], timeout: timedelta) -> Group:
    # the other ranks of the world have no part in this, and need not call it
    made = distributed.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    return cast(distributed.ProcessGroup, made)
