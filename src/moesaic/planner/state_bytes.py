"""Sharded state: bytes of weights, gradients and optimizer states under many plans, and their sums.

Parameters with the same placement, kind and unit of gathering are counted once with their number,
so a plan takes microseconds. The numbers are those of ``parallel/parameter_inventory.py``.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import nn

from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.distributed.world import BUCKET_BYTES
from moesaic.optim.group_update import UpdateRule
from moesaic.optim.optimizer import Optimizer
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import Precision
from moesaic.parallel.sharding_plan import Placement, local_spans, zero_dim
from moesaic.planner.step_memory import UpdatedBytes

_REPEATED_FROM = {"all-gather": 3, "reduce-scatter": 2}  # ZeRO's stage, in each micro-batch
UnitShape = tuple[tuple[tuple[Placement, bool], int], ...]  # ((placement, trained), number)


@dataclass(frozen=True, slots=True)
class ParameterClass:
    """``copies`` equal parameters of a model in units of gathering of one ``unit`` shape.

    ``state_per_value`` are the bytes of optimizer state of a value, 0 of what is not ``trained``;
    ``elementwise`` is that of its update rule.
    """

    placement: Placement
    in_block: bool
    copies: int
    state_per_value: float
    trained: bool
    elementwise: bool


class PlanKey(NamedTuple):
    """A plan of one pipeline stage, as a key of caches."""

    data: int
    context: int
    tensor: int
    expert: int
    expert_tensor: int
    zero: Literal[0, 1, 2, 3]

    @property
    def plan(self) -> ParallelPlan:
        """The plan."""
        return ParallelPlan(**self._asdict())


@dataclass(frozen=True, slots=True)
class ShardBytes:
    """Bytes of rank 0: its shards, and what ZeRO gathers beside them at the peak.

    Of ``streamed``, which a tier of parameters takes, ``experts`` are those of experts;
    ``updated``, ``by_matrix`` and ``summed_once`` are as in ``StateBytes``, ``summed`` of gradients
    that ranks sum, in so many ``buckets``. ``trained`` parameters have gradients. ``synced_once``
    is sent in a step, ``synced_often`` in each of its micro-batches.
    """

    values: int
    weights: int
    gathered: int
    streamed: int
    experts: int
    updated: UpdatedBytes
    by_matrix: UpdatedBytes
    summed_once: int
    summed: int
    buckets: int
    trained: int
    synced_once: tuple[CommunicationVolume, ...]
    synced_often: tuple[CommunicationVolume, ...]

    @property
    def read_and_written(self) -> int:
        """The bytes of an update: reads all that is trained, writes weights and states."""
        return 2 * self.updated.weights + self.gradients + 2 * self.states

    @property
    def gradients(self) -> int:
        """Bytes of gradients."""
        return self.updated.gradients

    @property
    def states(self) -> int:
        """Bytes of states."""
        return self.updated.states


class ShardedState:
    """The parameters of a model by class."""

    def __init__(
        self, inventory: ParameterInventory, *, optimizer: Optimizer, each: Precision
    ) -> None:
        self.optimizer, self._each = optimizer, each
        narrow = each.parameter_dtype != torch.float32
        master = each.master_weights.bytes_per_value if narrow else 0
        self.reads_weights = not master
        counted = Counter(
            (p.placement, p.kind, bool(p.fsdp_unit), p.trained) for p in inventory.parameters
        )
        self.classes = tuple(
            ParameterClass(
                placement,
                in_block,
                copies,
                trained * (_state(placement, kind, optimizer) + master),
                trained,
                _rule(placement, kind, optimizer).elementwise,
            )
            for (placement, kind, in_block, trained), copies in counted.items()
        )
        self._units = _unit_shapes(inventory)
        self.of_plan = lru_cache(maxsize=100_000)(self._of_plan)  # of a ``PlanKey``

    @property
    def values(self) -> int:
        """The parameters of the whole model."""
        return sum(math.prod(c.placement.shape) * c.copies for c in self.classes)

    def _of_plan(self, key: PlanKey) -> ShardBytes:
        """Return the bytes of a plan."""
        plan = key.plan
        sums = Counter[str]()
        updated = {False: Counter[str](), True: Counter[str]()}  # by elementwise
        weight, gradient = (
            dtype.itemsize for dtype in (self._each.parameter_dtype, self._each.gradient_dtype)
        )
        synced: Counter[tuple[str, str, bool]] = Counter()
        messages = self._unit_messages(key)
        for each in self.classes:
            shard = _shard(each.placement, key)
            values, is_expert = each.copies * shard.values, each.placement.num_experts is not None
            trained = values * each.trained
            streams = is_expert or (each.in_block and shard.zero_ranks == 1)
            sums["streamed"] += values * streams
            sums["values"] += values
            sums["experts"] += values * is_expert
            updated[each.elementwise] += Counter(
                weights=weight * trained,
                streamed=weight * trained * streams,
                gradients=gradient * trained,
                states=round(values * each.state_per_value),
            )
            sums["parameters"] += each.copies * each.trained
            sums["summed_once"] += trained * (key.zero == 1 and shard.zero_ranks > 1)
            sums["summed"] += trained * (shard.sum_ranks > 1)
            for kind, axis, size, often in _sync(shard, plan=plan, in_block=each.in_block):
                if kind != "all-gather" and not each.trained:
                    continue
                itemsize = weight if kind == "all-gather" else self._each.reduce_dtype.itemsize
                synced[kind, axis, often] += each.copies * round(size * itemsize)
                if kind == "all-reduce":  # a parameter above a bucket's size has one of its own
                    held = shard.values * weight
                    messages[kind, axis, often] += each.copies * min(1, held / BUCKET_BYTES)
        once, often = (
            tuple(
                CommunicationVolume(kind, axis, size, math.ceil(messages[kind, axis, each]))
                for (kind, axis, each), size in synced.items()
                if each == in_each
            )
            for in_each in (False, True)
        )
        return ShardBytes(
            values=sums["values"],
            weights=sums["values"] * weight,
            gathered=self._gathered(key),
            streamed=sums["streamed"] * weight,
            experts=sums["experts"] * weight,
            updated=UpdatedBytes(**(updated[True] + updated[False])),
            by_matrix=UpdatedBytes(**updated[False]),
            summed_once=sums["summed_once"] * gradient,
            summed=sums["summed"] * self._each.reduce_dtype.itemsize,
            buckets=sum(line.messages for line in once if line.kind == "all-reduce"),
            trained=sums["parameters"],
            synced_once=once,
            synced_often=often,
        )

    def _unit_messages(self, key: PlanKey) -> dict[tuple[str, str, bool], float]:
        """Return the gathers and sums of units of ZeRO by (kind, axis, in each micro-batch)."""
        found: defaultdict[tuple[str, str, bool], float] = defaultdict(float)
        for shape, number in self._units.items():
            cut = [(_shard(p, key), trained) for (p, trained), _ in shape]
            cut = [(shard, trained) for shard, trained in cut if shard.zero_ranks > 1]
            for kind, wanted in (("all-gather", cut), ("reduce-scatter", [c for c in cut if c[1]])):
                if wanted:
                    is_block, is_gather = shape != self._root, kind == "all-gather"
                    passes = 2 if is_gather and is_block and key.zero == 3 else 1
                    axis = "+".join(wanted[0][0].zero_axes)
                    found[kind, axis, key.zero >= _REPEATED_FROM[kind]] += passes * number
        return found

    def _gathered(self, plan: PlanKey) -> int:
        """Unsharded weights and gradients beside the shards: of all, or two units, and the root."""
        if not plan.zero:
            return 0
        sizes = {
            shape: sum(n * _shard(p, plan).gathered_beside for (p, _), n in shape)
            for shape in self._units
        }
        every = sum(n * sizes[shape] for shape, n in self._units.items())
        root = sizes.get(self._root, 0)
        blocks = [s for shape, s in sizes.items() if shape != self._root]
        two = 2 * max(blocks, default=0)
        weights = root + (two if plan.zero == 3 else every - root)
        gradients = root + (every - root if plan.zero == 1 else two)
        return (
            weights * self._each.parameter_dtype.itemsize
            + gradients * self._each.gradient_dtype.itemsize
        )

    @property
    def _root(self) -> UnitShape:
        return next(iter(self._units))


@dataclass(frozen=True, slots=True)
class _Shard:
    """A rank's shard of a parameter: its values, those before ZeRO, and over which axes it sums."""

    values: int
    before_zero: int
    zero_ranks: int
    zero_axes: tuple[str, ...]
    sum_ranks: int
    sum_axes: tuple[str, ...]

    @property
    def gathered_beside(self) -> int:
        return self.before_zero if self.zero_ranks > 1 else 0


@lru_cache(maxsize=200_000)
def _shard(placement: Placement, key: PlanKey) -> _Shard:
    plan = key.plan
    grid = RankGrid(plan.axes(num_experts=placement.num_experts))
    spans = local_spans(placement, grid=grid, coordinates=dict.fromkeys(grid.axes, 0))
    shape = tuple(sum(length for _, length in dim) for dim in spans)
    before, axes = math.prod(shape), placement.replicated_axes
    zero_axes = tuple(a for a in placement.zero_axes if plan.zero and grid.axes[a] > 1)
    zero_ranks = grid.size(zero_axes)
    values = before
    if zero_ranks > 1:
        dim = zero_dim(shape, ranks=zero_ranks)
        values = before // shape[dim] * -(-shape[dim] // zero_ranks)
    sum_axes = tuple(a for a in axes if a not in zero_axes and grid.axes[a] > 1)
    return _Shard(values, before, zero_ranks, zero_axes, grid.size(sum_axes), sum_axes)


def _sync(
    shard: _Shard, *, plan: ParallelPlan, in_block: bool
) -> Iterable[tuple[str, str, float, bool]]:
    """Yield (kind, axis, values sent, whether in each micro-batch) of one parameter."""
    if shard.zero_ranks > 1:
        axis, sent = "+".join(shard.zero_axes), shard.values * (shard.zero_ranks - 1)
        yield (
            "all-gather",
            axis,
            sent * (2 if plan.zero == 3 and in_block else 1),
            (plan.zero >= _REPEATED_FROM["all-gather"]),
        )
        yield "reduce-scatter", axis, sent, plan.zero >= _REPEATED_FROM["reduce-scatter"]
    if shard.sum_ranks > 1:
        sent = 2 * shard.values * (shard.sum_ranks - 1) / shard.sum_ranks
        whole = shard.sum_ranks == plan.stage_size  # dense layers and experts share buckets
        yield "all-reduce", "stage" if whole else "+".join(shard.sum_axes), sent, False


def _rule(placement: Placement, kind: str, optimizer: Optimizer) -> UpdateRule:
    parameter = nn.Parameter(torch.empty(placement.shape, device="meta"))
    return optimizer.param_group(parameter, kind=kind)["rule"]


def _state(placement: Placement, kind: str, optimizer: Optimizer) -> float:
    """Return the bytes of optimizer state of a value of a parameter."""
    parameter = nn.Parameter(torch.empty(placement.shape, device="meta"))
    rule = _rule(placement, kind, optimizer)
    state = sum(s.numel() * s.element_size() for s in rule.initial_state(parameter).values())
    return state / max(1, parameter.numel())


def _unit_shapes(inventory: ParameterInventory) -> dict[UnitShape, int]:
    """Return the distinct units of gathering with their number.

    The first is the root: parameters outside of blocks.
    """
    units: dict[str, Counter[tuple[Placement, bool]]] = {"": Counter()}
    for each in inventory.parameters:
        units.setdefault(each.fsdp_unit, Counter())[each.placement, each.trained] += 1
    return dict(Counter(tuple(found.items()) for found in units.values()))
