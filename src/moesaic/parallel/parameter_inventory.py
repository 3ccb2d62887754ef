"""Inventory: what one rank of a plan holds of every parameter, as arithmetic.

A model is made once on the meta device, where it holds no numbers; after that a plan costs nothing
to price. The numbers are those of ``apply.py``: cuts first, then the shares of ZeRO.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from moesaic.core.errors import ConfigError
from moesaic.distributed.mesh import DATA_CONTEXT_AXES, STAGE_AXES
from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.parallel.activation_checkpointing import NoCheckpointing
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.context_parallel import Ulysses
from moesaic.parallel.expert_dispatch import AllToAll
from moesaic.parallel.parallelize import check_parallel
from moesaic.parallel.sharding_plan import (
    Placement,
    expert_modules,
    local_spans,
    make_sharding_plan,
    zero_dim,
)
from moesaic.parallel.tensor_parallel import row_parallel_linears

EXPERT_STAGE_AXES = ("expert_data", "expert", "expert_tensor")
EXPERT_COPY_AXES = ("expert_data",)


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of the whole model. ``unit`` is the module that ZeRO gathers it with."""

    name: str
    placement: Placement
    kind: str
    fsdp_unit: str


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """What a rank holds of a parameter: ``whole`` is its cut part, ``share`` what ZeRO leaves.

    ``padded`` values travel when shares are gathered. ``zero`` are the axes of the ranks that share
    it out, and ``sums`` those over which its gradient is still to be summed.
    """

    parameter: ParameterInfo
    shape_before_zero: tuple[int, ...]
    shape: tuple[int, ...]
    gathered_values: int
    zero_axes: tuple[str, ...]
    all_reduce_axes: tuple[str, ...]


class ParameterInventory:
    """The parameters of a config, made without allocating any. Raises ConfigError with ``on``."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            model = Transformer(config)
        self.config, self._model = config, model
        kinds, table = model.parameter_kinds(), make_sharding_plan(model)
        self.parameters = tuple(
            ParameterInfo(name, laid, kinds[name], _fsdp_unit(name, laid))
            for name, laid in table.items()
        )

    @cached_property
    def first_rank_biases(self) -> frozenset[str]:
        """Biases that the first of the ranks which share a matrix adds; others have no gradient."""
        biases = {linear.bias for _, _, linear in row_parallel_linears(self._model)}
        return frozenset(name for name, p in self._model.named_parameters() if p in biases)

    @cached_property
    def expert_modules(self) -> dict[str, int]:
        """The experts' modules, and how many experts each has."""
        return {path: layer.router.config.experts for path, _, layer in expert_modules(self._model)}

    def on_rank(self, parallel: ParallelConfig, *, world: int, rank: int = 0) -> "RankParameters":
        """Return what a rank of ``world`` holds. Raises ConfigError where the plan is no fit."""
        plan = parallel.plan.resolve(world)
        problems = list(_not_estimated(parallel.replace(plan=plan)))
        if problems:
            raise ConfigError(problems)
        check_parallel(self._model, parallel=parallel, plan=plan)
        return RankParameters(self, parallel.replace(plan=plan), rank)


@dataclass(frozen=True)
class RankParameters:
    """What ``rank`` of a plan, with its ``data`` filled in, holds."""

    inventory: ParameterInventory
    parallel: ParallelConfig
    rank: int

    @property
    def plan(self) -> ParallelPlan:
        return self.parallel.plan

    @cached_property
    def shards(self) -> tuple[ParameterShard, ...]:
        """Every parameter's part."""
        return tuple(self._make_shards())

    def num_ranks(self, axes: Sequence[str], *, experts: int | None = None) -> int:
        """Return how many ranks differ in these axes alone."""
        return self.grid(experts).size(axes)

    def grid(self, experts: int | None = None) -> RankGrid:
        """Return the axes of dense layers or of those with so many experts."""
        return RankGrid(self.plan.axes(num_experts=experts))

    def group_name(self, axes: Sequence[str], *, experts: int | None = None) -> str:
        """Return what a group of ranks is called: by the axes in which they differ."""
        there = [axis for axis in axes if self.num_ranks((axis,), experts=experts) > 1]
        whole = len(there) > 1 and self.num_ranks(there, experts=experts) == self.plan.stage_size
        return "stage" if whole else "+".join(there)

    def _make_shards(self) -> Iterator[ParameterShard]:
        grids = {
            laid: self.grid(laid)
            for laid in {i.placement.experts for i in self.inventory.parameters}
        }
        places = {number: grid.coordinates(self.rank) for number, grid in grids.items()}
        for item in self.inventory.parameters:
            number = item.placement.experts
            yield self._make_shard(item, grid=grids[number], place=places[number])

    def _make_shard(
        self, item: ParameterInfo, *, grid: RankGrid, place: Mapping[str, int]
    ) -> ParameterShard:
        laid, number = item.placement, item.placement.experts
        runs = local_spans(laid, grid=grid, place=place)
        whole = tuple(sum(length for _, length in dim) for dim in runs)
        axes = laid.replicated_axes(STAGE_AXES if number is None else EXPERT_STAGE_AXES)
        zero = DATA_CONTEXT_AXES if number is None else EXPERT_COPY_AXES
        ranks = grid.size(zero)
        if not self.plan.zero or ranks == 1:
            return ParameterShard(item, whole, whole, math.prod(whole), (), axes)
        dim = zero_dim(whole, ranks=ranks)
        each = -(-whole[dim] // ranks)  # as FSDP2 cuts
        mine = RankGrid({axis: size for axis, size in grid.axes.items() if axis in zero}).rank_at(
            dict(place)
        )
        length = min(each, max(0, whole[dim] - mine * each))
        share = (*whole[:dim], length, *whole[dim + 1 :])
        padded = math.prod(whole[:dim]) * each * math.prod(whole[dim + 1 :])
        rest = tuple(axis for axis in axes if axis not in zero)
        return ParameterShard(item, whole, share, padded, zero, rest)


def _not_estimated(parallel: ParallelConfig) -> Iterator[str]:
    """Yield what forecasts know nothing of."""
    plan = parallel.plan
    far = plan.expert * plan.expert_tensor > 1
    parts: list[tuple[str, object, type, bool]] = [
        ("context_parallel", parallel.context_parallel, Ulysses, plan.context > 1),
        ("dispatch", parallel.dispatch, AllToAll, far),
        ("activation_checkpointing", parallel.activation_checkpointing, NoCheckpointing, True),
    ]
    if plan.pipe > 1:
        yield f"parallel.plan.pipe={plan.pipe}: forecasts know one stage alone, so set it to 1"
    for name, found, known, matters in parts:
        if matters and not isinstance(found, known):
            yield (
                f"parallel.{name}={type(found).__name__}: what it takes is not forecast, expected "
                f"{known.__name__}; a run can count it (distributed/communication_counter.py)"
            )


def _fsdp_unit(name: str, laid: Placement) -> str:
    """Experts are gathered by themselves, a block at a time, and the rest with the model."""
    if laid.experts is not None:
        return name.rpartition(".")[0]
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("encoder", "decoder") else ""
