"""Sharding plan: the dims of each parameter that are sharded, over which axes, and their slices.

The plan is a table made from the modules of a whole model. Dense layers are sharded as in Megatron
(1909.08053, section 3), experts as in GShard (2006.16668) and MoE Parallel Folding (2504.14960). A
matrix that concatenates several (queries, keys and values; gate and value) is sharded segment by
segment, so that a rank's slice is the same concatenation with fewer channels. Parameters without a
sharded dim are replicated over the ranks of a pipeline stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import torch
from torch import nn

from moesaic.checkpoint.snapshot import Shard, ShardBlock
from moesaic.core.shapes import Shaped, Tensor
from moesaic.distributed.mesh import DATA_CONTEXT_AXES, STAGE_AXES
from moesaic.distributed.parallel_plan import RankGrid
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import ExpertModule, GroupedExperts
from moesaic.moe.layer import MoELayer
from moesaic.nn.adapter import ADAPTER, adapter_name
from moesaic.nn.embedding import Embedding
from moesaic.nn.shardable_module import ShardableModule
from moesaic.ops.blockwise_quantization import blocks_per_row

EXPERT_STAGE_AXES = ("expert_data", "expert", "expert_tensor")


@dataclass(frozen=True, slots=True)
class ShardedDim:
    """``dim`` is sharded over ``axis``; ``segments`` are the lengths concatenated in it."""

    axis: str
    dim: int
    segments: tuple[int, ...]

    def spans(self, index: int, count: int) -> tuple[tuple[int, int], ...]:
        """Return (start, length) in each segment of the slice of rank ``index`` of ``count``."""
        spans, offset = [], 0
        for length in self.segments:
            first, last = length * index // count, length * (index + 1) // count
            spans.append((offset + first, last - first))
            offset += length
        return tuple(spans)


@dataclass(frozen=True, slots=True)
class Placement:
    """The full ``shape`` of one parameter and its sharded dims.

    ``num_experts`` is the layer's number of experts where the axes are those of an MoE layer.
    """

    shape: tuple[int, ...]
    sharded_dims: tuple[ShardedDim, ...] = ()
    num_experts: int | None = None

    @property
    def replicated_axes(self) -> tuple[str, ...]:
        """The axes of a pipeline stage over which every rank holds a copy."""
        axes = STAGE_AXES if self.num_experts is None else EXPERT_STAGE_AXES
        return tuple(axis for axis in axes if axis not in {dim.axis for dim in self.sharded_dims})

    @property
    def zero_axes(self) -> tuple[str, ...]:
        """The axes over which ZeRO shards the copies."""
        return DATA_CONTEXT_AXES if self.num_experts is None else ("expert_data",)


ShardingPlan = dict[str, Placement]


def make_sharding_plan(model: Transformer) -> ShardingPlan:
    """Return the placement of every parameter of a whole model, by name."""
    sharded = {
        f"{path}.{name}": placement
        for path, module in model.named_modules()
        for name, placement in _placements(module)
    }
    return {
        name: sharded.get(name, Placement(tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
    }


def _placements(module: nn.Module) -> Iterator[tuple[str, Placement]]:
    """Yield the placements of a layer's sharded parameters, by their names in it."""
    if isinstance(module, ShardableModule):
        parameters = dict(module.named_parameters())
        for name, sharded in module.tensor_sharding().tensors.items():
            dims = (ShardedDim("tensor", sharded.dim, sharded.segments),)
            yield name, Placement(tuple(parameters[name].shape), dims)
            factor = adapter_name(name, "b" if sharded.dim == 0 else "a")
            if factor in parameters:  # the factor of a low-rank adapter that has this dim
                yield factor, Placement(tuple(parameters[factor].shape), dims)
    elif isinstance(module, Embedding):
        for name, table in module.named_parameters():
            shape = tuple(table.shape)
            yield name, Placement(shape, (ShardedDim("tensor", 0, (shape[0],)),))
    elif isinstance(module, MoELayer):
        yield from _expert_placements(module)


def _expert_placements(layer: MoELayer) -> Iterator[tuple[str, Placement]]:
    experts, number = layer.experts, layer.router.config.experts
    hidden = _expert_tensor_dims(experts) if isinstance(experts, GroupedExperts) else {}
    for name, parameter in experts.named_parameters():
        shape, within = tuple(parameter.shape), name.removeprefix(f"{ADAPTER}.")
        if "." in within or shape[0] != number:  # shared by the experts of the layer
            continue
        dims = (ShardedDim("expert", 0, (number,)), *hidden.get(name, ()))
        yield f"experts.{name}", Placement(shape, dims, number)


def _expert_tensor_dims(experts: GroupedExperts) -> dict[str, tuple[ShardedDim, ...]]:
    hidden, width = experts.down.shape[1], experts.up.shape[2]
    segments = (hidden,) * (width // hidden)
    return {
        "up": (ShardedDim("expert_tensor", 2, segments),),
        "up_bias": (ShardedDim("expert_tensor", 1, segments),),
        "down": (ShardedDim("expert_tensor", 1, (hidden,)),),
        f"{ADAPTER}.up_b": (ShardedDim("expert_tensor", 2, segments),),
        f"{ADAPTER}.down_a": (ShardedDim("expert_tensor", 1, (hidden,)),),
    }


def expert_modules(model: nn.Module) -> Iterator[tuple[str, ExpertModule, MoELayer]]:
    """Yield the module path of each layer's experts, the experts and the layer."""
    for path, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield f"{path}.experts", module.experts, module


Spans = tuple[tuple[int, int], ...]  # (start, length) of each run of a dim that a slice contains


def local_spans(
    placement: Placement, *, grid: RankGrid, coordinates: Mapping[str, int]
) -> tuple[Spans, ...]:
    """Return the spans of each dim of a parameter that the rank at ``coordinates`` holds."""
    spans: list[Spans] = [((0, size),) for size in placement.shape]
    for sharded in placement.sharded_dims:
        spans[sharded.dim] = sharded.spans(coordinates[sharded.axis], grid.axes[sharded.axis])
    return tuple(spans)


def slice_local(full: Shaped[Tensor, "*N"], spans: Sequence[Spans]) -> Shaped[Tensor, "*n"]:
    """Return a rank's slice of a full tensor, contiguous; the tensor itself if that is all."""
    part = full
    for dim, runs in enumerate(spans):
        if sum(length for _, length in runs) < full.shape[dim]:
            part = torch.cat([part.narrow(dim, *run) for run in runs or [(0, 0)]], dim)
    return part.contiguous()


def clip_spans(spans: Sequence[Spans], *, dim: int, start: int, length: int) -> tuple[Spans, ...]:
    """Return the spans of ``length`` rows of a slice along ``dim``, from its row ``start`` on."""
    clipped, offset = [], 0
    for first, size in spans[dim]:
        low, high = max(start, offset), min(start + length, offset + size)
        if high > low:
            clipped.append((first + low - offset, high - low))
        offset += size
    return (*spans[:dim], tuple(clipped), *spans[dim + 1 :])


def spans_of_blocks(spans: Spans, *, block: int) -> Spans:
    """Return the blocks of a row that a rank has, by the values that it has: whole blocks."""
    runs: list[tuple[int, int]] = []
    for start, length in spans:
        first, so_far = runs[-1] if runs else (start, 0)
        if first + so_far == start:  # segments that are not cut: a block may be in two of them
            runs[-1:] = [(first, so_far + length)]
        else:
            runs.append((start, length))
    return tuple((start // block, blocks_per_row(length, block=block)) for start, length in runs)


def describe_shard(
    part: Shaped[Tensor, "*n"], spans: Sequence[Spans], *, shape: Sequence[int]
) -> Shard:
    """Describe a slice in memory as blocks of the full tensor of ``shape``."""
    blocks = []
    for runs in product(*map(_local_offsets, spans)):
        block = part.detach()
        for dim, (_, offset, length) in enumerate(runs):
            block = block.narrow(dim, offset, length)
        blocks.append(ShardBlock(tuple(start for start, _, _ in runs), block))
    return Shard(tuple(shape), part.dtype, tuple(blocks))


def write_shard(full: Shaped[Tensor, "*N"], shard: Shard) -> None:
    """Copy a rank's blocks into a full tensor."""
    for block in shard.blocks:
        target = full
        for dim, (start, length) in enumerate(zip(block.offset, block.data.shape, strict=True)):
            target = target.narrow(dim, start, length)
        target.copy_(block.data)


def _local_offsets(spans: Spans) -> list[tuple[int, int, int]]:
    """Return (start in the full dim, start in the slice, length) of each run."""
    starts = accumulate((length for _, length in spans), initial=0)
    return [(start, offset, length) for (start, length), offset in zip(spans, starts, strict=False)]


@dataclass(frozen=True, slots=True)
class GradientSync:
    """The axes over which a parameter's gradient is summed.

    ``all_reduce_axes`` are summed after backward. ``zero_axes`` are reduce-scattered by ZeRO, which
    shards the parameter over them.
    """

    all_reduce_axes: tuple[str, ...]
    zero_axes: tuple[str, ...] = ()


def zero_dim(shape: tuple[int, ...], *, ranks: int) -> int:
    """Return the dim along which ZeRO shards a parameter: the first, where it is long enough.

    Stacked weights of fewer experts than ranks are sharded along the second dim if it divides.
    """
    if shape and shape[0] < ranks and len(shape) > 2 and shape[1] % ranks == 0:
        return 1
    return 0
