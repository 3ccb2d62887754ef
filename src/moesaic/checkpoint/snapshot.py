"""Snapshot: everything a run needs to go on, as plain values and named tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.checkpoint.shard import ShardFiles
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after ``step`` updates, whole.

    ``files`` maps a file name without ending (``model``, ``optimizer``, ``random``) to its named
    tensors. ``state`` is JSON-able: the config, the data position, counters. ``banks`` names the
    parameters that hold experts along their first dim, with their number. ``plan`` says how the run
    was laid out over ranks (JSON data, for people).
    """

    step: int
    files: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    expert_parameters: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankSnapshot:
    """What one rank holds of a snapshot: shards, and tensors that every rank holds whole.

    A rank may hold nothing of a tensor or not know it at all (another stage of a pipeline has it).
    ``state``, ``banks`` and ``plan`` are alike on all ranks.
    """

    step: int
    files: ShardFiles
    state: dict[str, Any] = field(default_factory=dict)
    expert_parameters: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
