"""Process groups: size and rank, and the split of a group into inner and outer subgroups.

``None`` stands for a group of one rank. Inner subgroups are runs of consecutive ranks (a node);
outer ones hold the ranks at the same position of every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as distributed

Group = distributed.ProcessGroup | None


def group_size(group: Group) -> int:
    """Return the number of ranks in a group."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """Return the rank of this process within a group."""
    return 0 if group is None else group.rank()


@dataclass(frozen=True, slots=True)
class Subgroups:
    """``inner`` is this rank's run of consecutive ranks, ``outer`` its position in every run."""

    inner: Group
    outer: Group


def split_group(group: Group, *, inner_size: int, timeout_s: float = 120.0) -> Subgroups:
    """Split a group into runs of ``inner_size`` ranks. Collective over this group alone.

    A rank that does not answer in a subgroup within ``timeout_s`` ends the run. Raises ValueError
    where ``inner_size`` does not divide the group.
    """
    size = group_size(group)
    if inner_size < 1 or size % inner_size:
        raise ValueError(f"{size} ranks cannot be split into runs of {inner_size}")
    if group is None or inner_size == 1:
        return Subgroups(None, group)
    if inner_size == size:
        return Subgroups(group, None)
    ranks = distributed.get_process_group_ranks(group)
    run, position = divmod(group_rank(group), inner_size)
    inner = new_group(ranks[run * inner_size : (run + 1) * inner_size], timeout_s=timeout_s)
    return Subgroups(inner, new_group(ranks[position::inner_size], timeout_s=timeout_s))


def new_group(ranks: Sequence[int], *, timeout_s: float) -> Group:
    """Create the group of these ranks. Collective over them alone."""
    timeout = timedelta(seconds=timeout_s)
    group = distributed.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    return cast(distributed.ProcessGroup, group)
