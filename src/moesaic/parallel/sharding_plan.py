"""Layout: which dims of which parameters are cut over which axis, and where the copies are.

A table made of the model's modules, as data. A matrix may be several side by side (queries, keys
and values; gate and value): each *segment* is cut evenly, so that a rank's slice is again such a
matrix, only narrower. What no axis cuts is held by every rank of a stage.

The cuts are those of Megatron (1909.08053, section 3) for dense layers and of GShard (2006.16668)
and MoE Parallel Folding (2504.14960) for experts.

Slices: a rank's part of a tensor, taken from the whole and described as blocks of it.

Sharing: where the copies of a parameter lie, and how ZeRO shares them out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from moesaic.checkpoint.snapshot import Shard, ShardBlock
from moesaic.core.shapes import Shaped, Tensor
from moesaic.distributed.parallel_plan import RankGrid
from moesaic.model.block import FeedForwardBranch
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import ExpertModule, GroupedExperts
from moesaic.moe.layer import MoELayer
from moesaic.nn.attention import CrossAttention, SelfAttention
from moesaic.nn.embedding import Embedding


@dataclass(frozen=True, slots=True)
class ShardedDim:
    """``dim`` is cut over ``axis``; ``segments`` are the lengths that lie side by side in it."""

    axis: str
    dim: int
    segments: tuple[int, ...]

    def spans(self, index: int, count: int) -> tuple[tuple[int, int], ...]:
        """Return (start, length) of what the rank at ``index`` of ``count`` holds, by segment."""
        found, offset = [], 0
        for length in self.segments:
            first, last = length * index // count, length * (index + 1) // count
            found.append((offset + first, last - first))
            offset += length
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Placement:
    """How one parameter lies: its whole ``shape``, and its cuts.

    ``experts`` is the layer's number of them, where the axes are those of a layer with experts.
    """

    shape: tuple[int, ...]
    sharded_dims: tuple[ShardedDim, ...] = ()
    experts: int | None = None

    def replicated_axes(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the axes of a stage over which every rank holds a copy."""
        return tuple(axis for axis in axes if axis not in {cut.axis for cut in self.sharded_dims})


ShardingPlan = dict[str, Placement]


def make_sharding_plan(model: Transformer) -> ShardingPlan:
    """Return how every parameter of a whole model lies, by name."""
    cut = {
        f"{path}.{name}": laid
        for path, module in _placements_by_module(model)
        for name, laid in module
    }
    return {
        name: cut.get(name, Placement(tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
    }


def _placements_by_module(
    model: nn.Module,
) -> Iterator[tuple[str, Iterator[tuple[str, Placement]]]]:
    for path, module in model.named_modules():
        if isinstance(module, SelfAttention):
            yield path, _self_attention_placements(module)
        elif isinstance(module, CrossAttention):
            yield path, _cross_attention_placements(module)
        elif isinstance(module, FeedForwardBranch):
            yield path, _feed_forward_placements(module)
        elif isinstance(module, MoELayer):
            yield path, _expert_placements(module)
        elif isinstance(module, Embedding):
            yield path, _embedding_placements(module)


def _self_attention_placements(module: SelfAttention) -> Iterator[tuple[str, Placement]]:
    query, keys = module.heads * module.head_dim, module.kv_heads * module.head_dim
    yield from _column_parallel("qkv", module.qkv, segments=(query, keys, keys))
    yield from _row_parallel("out", module.out)


def _cross_attention_placements(module: CrossAttention) -> Iterator[tuple[str, Placement]]:
    keys = module.kv_heads * module.head_dim
    yield from _column_parallel("query", module.query, segments=(module.heads * module.head_dim,))
    yield from _column_parallel("kv", module.kv, segments=(keys, keys))
    yield from _row_parallel("out", module.out)


def _feed_forward_placements(branch: FeedForwardBranch) -> Iterator[tuple[str, Placement]]:
    up, down = branch.inner.up, branch.inner.down
    hidden = down.in_features
    yield from _column_parallel("inner.up", up, segments=(hidden,) * (up.out_features // hidden))
    yield from _row_parallel("inner.down", down)


def _embedding_placements(module: Embedding) -> Iterator[tuple[str, Placement]]:
    for name, table in module.named_parameters():
        shape = tuple(table.shape)
        yield name, Placement(shape, (ShardedDim("tensor", 0, (shape[0],)),))


def _column_parallel(
    name: str, linear: nn.Linear, *, segments: tuple[int, ...]
) -> Iterator[tuple[str, Placement]]:
    """Each rank makes some of the outputs."""
    cut = (ShardedDim("tensor", 0, segments),)
    yield f"{name}.weight", Placement(tuple(linear.weight.shape), cut)
    if linear.bias is not None:
        yield f"{name}.bias", Placement(tuple(linear.bias.shape), cut)


def _row_parallel(name: str, linear: nn.Linear) -> Iterator[tuple[str, Placement]]:
    """Each rank reads some of the inputs; the parts of an output are added, its bias once."""
    shape = tuple(linear.weight.shape)
    yield f"{name}.weight", Placement(shape, (ShardedDim("tensor", 1, (shape[1],)),))


def _expert_placements(layer: MoELayer) -> Iterator[tuple[str, Placement]]:
    bank, experts = layer.experts, layer.router.config.experts
    hidden = _expert_tensor_dims(bank) if isinstance(bank, GroupedExperts) else {}
    for name, parameter in bank.named_parameters():
        shape = tuple(parameter.shape)
        if "." in name or shape[0] != experts:  # what the experts of a layer share
            continue
        cuts = (ShardedDim("expert", 0, (experts,)), *hidden.get(name, ()))
        yield f"experts.{name}", Placement(shape, cuts, experts)


def _expert_tensor_dims(bank: GroupedExperts) -> dict[str, tuple[ShardedDim, ...]]:
    hidden, width = bank.down.shape[1], bank.up.shape[2]
    wide = (hidden,) * (width // hidden)
    return {
        "up": (ShardedDim("expert_tensor", 2, wide),),
        "up_bias": (ShardedDim("expert_tensor", 1, wide),),
        "down": (ShardedDim("expert_tensor", 1, (hidden,)),),
    }


def expert_modules(model: nn.Module) -> Iterator[tuple[str, ExpertModule, MoELayer]]:
    """Yield the experts of every layer with the name of their module."""
    for path, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield f"{path}.experts", module.experts, module


Spans = tuple[tuple[int, int], ...]  # (start, length) of runs of a dim that are held side by side


def local_spans(
    placement: Placement, *, grid: RankGrid, place: Mapping[str, int]
) -> tuple[Spans, ...]:
    """Return what the rank at ``place`` holds of each dim of a parameter."""
    found: list[Spans] = [((0, size),) for size in placement.shape]
    for cut in placement.sharded_dims:
        found[cut.dim] = cut.spans(place[cut.axis], grid.axes[cut.axis])
    return tuple(found)


def slice_local(whole: Shaped[Tensor, "*N"], held: Sequence[Spans]) -> Shaped[Tensor, "*n"]:
    """Return a rank's part of a whole tensor, contiguous; the tensor itself if that is all."""
    part = whole
    for dim, runs in enumerate(held):
        if sum(length for _, length in runs) < whole.shape[dim]:
            part = torch.cat([part.narrow(dim, *run) for run in runs or [(0, 0)]], dim)
    return part.contiguous()


def clip_spans(held: Sequence[Spans], *, dim: int, start: int, length: int) -> tuple[Spans, ...]:
    """Return what is left of a part when only ``length`` rows of its ``dim`` are kept."""
    kept, at = [], 0
    for first, size in held[dim]:
        low, high = max(start, at), min(start + length, at + size)
        if high > low:
            kept.append((first + low - at, high - low))
        at += size
    return (*held[:dim], tuple(kept), *held[dim + 1 :])


def describe_shard(
    part: Shaped[Tensor, "*n"], held: Sequence[Spans], *, shape: Sequence[int]
) -> Shard:
    """Describe a part in memory as blocks of the whole of ``shape``."""
    pieces = []
    for runs in product(*(_local_offsets(spans_) for spans_ in held)):
        block = part.detach()
        for dim, (_, here, length) in enumerate(runs):
            block = block.narrow(dim, here, length)
        pieces.append(ShardBlock(tuple(start for start, _, _ in runs), block))
    return Shard(tuple(shape), part.dtype, tuple(pieces))


def write_shard(whole: Shaped[Tensor, "*N"], found: Shard) -> None:
    """Write a rank's blocks into a whole tensor."""
    for piece in found.blocks:
        target = whole
        for dim, (start, length) in enumerate(zip(piece.offset, piece.data.shape, strict=True)):
            target = target.narrow(dim, start, length)
        target.copy_(piece.data)


def _local_offsets(held: Spans) -> list[tuple[int, int, int]]:
    """Return (start in the whole, start in the part, length) of each run."""
    found, at = [], 0
    for start, length in held:
        found.append((start, at, length))
        at += length
    return found


@dataclass(frozen=True, slots=True)
class GradientSync:
    """Over which axes the copies of a parameter lie, and the ranks that share out each copy.

    ``axes`` are summed after backward; ``zero`` are those that ZeRO has summed and shared out.
    """

    all_reduce_axes: tuple[str, ...]
    zero_axes: tuple[str, ...] = ()


def zero_dim(shape: tuple[int, ...], *, ranks: int) -> int:
    """Return the dim along which ZeRO shares out a parameter: the first, where it is long enough.

    A bank of fewer experts than ranks is shared out along its second dim, if that divides evenly.
    """
    if shape and shape[0] < ranks and len(shape) > 2 and shape[1] % ranks == 0:
        return 1
    return 0
