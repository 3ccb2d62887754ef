"""Subgroups of a group: runs of neighbours, and the ranks at one place of every run."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as distributed

Group = distributed.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class Subgroups:
    """``near`` are this rank's neighbours in its run, ``far`` those at its place in each run."""

    inner: Group
    outer: Group


def split_group(group: Group, *, inner_size: int, timeout_s: float = 120.0) -> Subgroups:
    """Cut a group into runs of so many ranks. Collective over the group alone.

    A rank that does not answer in one of them within ``timeout_s`` ends the run.

    Raises ValueError where the runs do not come out even.
    """
    size = group_size(group)
    if inner_size < 1 or size % inner_size:
        raise ValueError(f"{size} ranks cannot be cut into runs of {inner_size}")
    if group is None or inner_size == 1:
        return Subgroups(None, group)
    if inner_size == size:
        return Subgroups(group, None)
    ranks = distributed.get_process_group_ranks(group)
    start, place = group_rank(group) // inner_size * inner_size, group_rank(group) % inner_size
    wait = timedelta(seconds=timeout_s)
    near, far = (
        _new_group(ranks[start : start + inner_size], wait),
        _new_group(ranks[place::inner_size], wait),
    )
    return Subgroups(near, far)


def _new_group(ranks: Sequence[int], timeout: timedelta) -> Group:
    # the other ranks of the world have no part in this, and need not call it
    made = distributed.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    return cast(distributed.ProcessGroup, made)


def group_size(group: Group) -> int:
    """Return how many ranks share a group."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """Return this process's place in a group."""
    return 0 if group is None else group.rank()
