"""Parameter inventory: the shape of every parameter's shard on a rank of a plan, by arithmetic.

The model is built once on the meta device, without memory; each plan is then computed in
milliseconds. The numbers are those of ``parallelize.py``: axes that shard dims first, then ZeRO.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.transformer import Transformer
from moesaic.nn.adapter import ADAPTER
from moesaic.nn.fused_projections import fused_outputs
from moesaic.optim.optimizer import Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.parallel.pipeline_stages import PipelineStages
from moesaic.parallel.sharding_plan import (
    Placement,
    expert_modules,
    local_spans,
    make_sharding_plan,
    zero_dim,
)
from moesaic.parallel.state_blocks import check_state_blocks
from moesaic.parallel.tensor_parallel import row_parallel_linears
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of the whole model; ``fsdp_unit`` is the module that ZeRO gathers it with.

    What is not ``trained`` has no gradient and no state.
    """

    name: str
    placement: Placement
    kind: str
    fsdp_unit: str
    trained: bool


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

    @property
    def streams(self) -> bool:
        """Whether a tier of parameters takes it: those of blocks, unless ZeRO shards them."""
        is_expert = self.parameter.placement.num_experts is not None
        return is_expert or bool(self.parameter.fsdp_unit and not self.zero_axes)


class ParameterInventory:
    """The parameters of a model config and of adapters in it, without allocating any."""

    def __init__(
        self, config: ModelConfig, *, trainable: TrainableParameters | None = None
    ) -> None:
        trainable = trainable or AllParameters()
        count_parameters(config)  # a sentence if a tensor is too large for the meta device, too
        with torch.device("meta"):
            model = Transformer(config)
            trainable.attach(model)
        self.config, self._model, self._trainable = config, model, trainable
        kinds = model.parameter_kinds()
        self.parameters = tuple(
            ParameterInfo(
                name,
                placement,
                kinds[name],
                _fsdp_unit(name, placement),
                trained=trainable.includes(name),
            )
            for name, placement in make_sharding_plan(model).items()
        )

    @cached_property
    def first_rank_biases(self) -> frozenset[str]:
        """Biases that the first tensor rank adds; on the other ranks they have no gradient."""
        biases = {linear.bias for _, _, linear in row_parallel_linears(self._model)}
        return frozenset(name for name, p in self._model.named_parameters() if p in biases)

    @cached_property
    def fused_outputs(self) -> dict[str, tuple[int, ...]]:
        """The output widths of the matrices that hold several maps, by name."""
        return fused_outputs(self._model)

    @cached_property
    def expert_modules(self) -> dict[str, int]:
        """The paths of the experts' modules, with the number of experts of each."""
        return {path: layer.router.config.experts for path, _, layer in expert_modules(self._model)}

    def check_states(self, optimizer: Optimizer, *, plan: ParallelPlan) -> None:
        """Raise ConfigError if the states of an optimizer cannot be cut as a plan cuts rows."""
        check_state_blocks(self._model, optimizer=optimizer, trainable=self._trainable, plan=plan)

    def on_rank(self, parallel: ParallelConfig, *, world: int, rank: int = 0) -> "RankParameters":
        """Return the shards of a rank of ``world``. Raises ConfigError if the plan does not fit."""
        plan = parallel.plan.resolve(world)
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
        """The shard of every parameter that the rank holds."""
        return tuple(map(self._shard, self._held))

    @cached_property
    def trained(self) -> tuple[ParameterShard, ...]:
        """The shards of the parameters that are trained."""
        return tuple(s for s in self.shards if s.parameter.trained)

    @cached_property
    def stages(self) -> PipelineStages | None:
        """The stages of the pipeline, if there is one."""
        several = self.plan.pipe > 1
        return self.parallel.pipeline_stages(self.inventory.config) if several else None

    @property
    def pipe_rank(self) -> int:
        """The rank's place in its pipeline."""
        return self.grid().coordinates(self.rank)["pipe"]

    def holders(self, parameter: ParameterInfo) -> tuple[int, ...]:
        """Return the ranks of a pipeline that hold a parameter."""
        return (0,) if self.stages is None else self.stages.ranks_of(parameter.name)

    @property
    def _held(self) -> list[ParameterInfo]:
        return [p for p in self.inventory.parameters if self.pipe_rank in self.holders(p)]

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

    def _is_outside_units(self, parameter: ParameterInfo) -> bool:
        """Whether ZeRO leaves a parameter alone: in a pipeline, the norms outside of blocks."""
        outside = not (parameter.fsdp_unit or parameter.name.startswith("embedding."))
        return self.plan.pipe > 1 and outside

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
        if not self.plan.zero or ranks == 1 or self._is_outside_units(parameter):
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


def _fsdp_unit(name: str, placement: Placement) -> str:
    """Return the module that is gathered with a parameter: experts, a block, or the model ("")."""
    if placement.num_experts is not None:
        return name.rpartition(".")[0].removesuffix(f".{ADAPTER}")
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("encoder", "decoder") else ""
