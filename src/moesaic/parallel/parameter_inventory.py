"""Parameter inventory: the shape of every parameter's shard on a rank of a plan, by arithmetic.

The model is built once on the meta device, without memory; each plan is then computed in
milliseconds. The numbers are those of ``parallelize.py``: axes that shard dims first, then ZeRO.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.transformer import Transformer
from moesaic.parallel.activation_checkpointing import NoActivationCheckpointing
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


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of the whole model; ``fsdp_unit`` is the module that ZeRO gathers it with."""

    name: str
    placement: Placement
    kind: str
    fsdp_unit: str


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """A rank's shard of a parameter: its shape before and after ZeRO shards it.

    ``gathered_values`` counts the values that ZeRO gathers, padding included, over ``zero_axes``.
    Its gradient is summed over ``all_reduce_axes``.
    """

    parameter: ParameterInfo
    shape_before_zero: tuple[int, ...]
    shape: tuple[int, ...]
    gathered_values: int
    zero_axes: tuple[str, ...]
    all_reduce_axes: tuple[str, ...]


class ParameterInventory:
    """The parameters of a model config, without allocating any."""

    def __init__(self, config: ModelConfig) -> None:
        count_parameters(config)  # a sentence if a tensor is too large for the meta device, too
        with torch.device("meta"):
            model = Transformer(config)
        self.config, self._model = config, model
        kinds = model.parameter_kinds()
        self.parameters = tuple(
            ParameterInfo(name, placement, kinds[name], _fsdp_unit(name, placement))
            for name, placement in make_sharding_plan(model).items()
        )

    @cached_property
    def first_rank_biases(self) -> frozenset[str]:
        """Biases that the first tensor rank adds; on the other ranks they have no gradient."""
        biases = {linear.bias for _, _, linear in row_parallel_linears(self._model)}
        return frozenset(name for name, p in self._model.named_parameters() if p in biases)

    @cached_property
    def expert_modules(self) -> dict[str, int]:
        """The paths of the experts' modules, with the number of experts of each."""
        return {path: layer.router.config.experts for path, _, layer in expert_modules(self._model)}

    def on_rank(self, parallel: ParallelConfig, *, world: int, rank: int = 0) -> "RankParameters":
        """Return the shards of a rank of ``world``. Raises ConfigError if the plan does not fit."""
        plan = parallel.plan.resolve(world)
        problems = list(_not_estimated(parallel.replace(plan=plan)))
        if problems:
            raise ConfigError(problems)
        check_parallel(self._model, parallel=parallel, plan=plan)
        return RankParameters(self, parallel.replace(plan=plan), rank)


@dataclass(frozen=True)
class RankParameters:
    """The parameter shards of ``rank`` under a plan whose ``data`` degree is resolved."""

    inventory: ParameterInventory
    parallel: ParallelConfig
    rank: int

    @property
    def plan(self) -> ParallelPlan:
        return self.parallel.plan

    @cached_property
    def shards(self) -> tuple[ParameterShard, ...]:
        """The shard of every parameter."""
        return tuple(map(self._shard, self.inventory.parameters))

    def grid(self, num_experts: int | None = None) -> RankGrid:
        """Return the grid of ranks of dense layers, or of layers with so many experts."""
        return RankGrid(self.plan.axes(num_experts=num_experts))

    def num_ranks(self, axes: Sequence[str], *, num_experts: int | None = None) -> int:
        """Return how many ranks differ in these axes only."""
        return self.grid(num_experts).size(axes)

    def group_name(self, axes: Sequence[str], *, num_experts: int | None = None) -> str:
        """Return the name of a group of ranks: the axes in which they differ."""
        names = [axis for axis in axes if self.num_ranks((axis,), num_experts=num_experts) > 1]
        ranks = self.num_ranks(names, num_experts=num_experts)
        return "stage" if len(names) > 1 and ranks == self.plan.stage_size else "+".join(names)

    def _shard(self, parameter: ParameterInfo) -> ParameterShard:
        placement = parameter.placement
        grid, axes = self.grid(placement.num_experts), placement.replicated_axes
        coordinates = grid.coordinates(self.rank)
        spans = local_spans(placement, grid=grid, coordinates=coordinates)
        shape, zero_axes = (
            tuple(sum(length for _, length in dim) for dim in spans),
            placement.zero_axes,
        )
        ranks = grid.size(zero_axes)
        if not self.plan.zero or ranks == 1:
            return ParameterShard(parameter, shape, shape, math.prod(shape), (), axes)
        dim = zero_dim(shape, ranks=ranks)
        size = -(-shape[dim] // ranks)  # FSDP2 shards as torch.chunk does
        zero_grid = RankGrid({axis: n for axis, n in grid.axes.items() if axis in zero_axes})
        start = zero_grid.rank_at(dict(coordinates)) * size
        length = min(size, max(0, shape[dim] - start))
        outer, inner = shape[:dim], shape[dim + 1 :]
        return ParameterShard(
            parameter,
            shape_before_zero=shape,
            shape=(*outer, length, *inner),
            gathered_values=math.prod((*outer, size, *inner)),
            zero_axes=zero_axes,
            all_reduce_axes=tuple(axis for axis in axes if axis not in zero_axes),
        )


def _not_estimated(parallel: ParallelConfig) -> Iterator[str]:
    """Yield a sentence for each choice whose memory and communication are not estimated."""
    plan = parallel.plan
    choices: list[tuple[str, object, type, bool]] = [
        ("context_parallel", parallel.context_parallel, Ulysses, plan.context > 1),
        ("dispatch", parallel.dispatch, AllToAll, plan.expert * plan.expert_tensor > 1),
        (
            "activation_checkpointing",
            parallel.activation_checkpointing,
            NoActivationCheckpointing,
            True,
        ),
    ]
    if plan.pipe > 1:
        yield f"parallel.plan.pipe={plan.pipe}: estimates are for one pipeline stage, set it to 1"
    for name, choice, estimated, applies in choices:
        if applies and not isinstance(choice, estimated):
            yield (
                f"parallel.{name}={type(choice).__name__} is not estimated, expected "
                f"{estimated.__name__}; measure it in a run (distributed/communication_counter.py)"
            )


def _fsdp_unit(name: str, placement: Placement) -> str:
    """Return the module that is gathered with a parameter: experts, a block, or the model ("")."""
    if placement.num_experts is not None:
        return name.rpartition(".")[0]
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("encoder", "decoder") else ""
