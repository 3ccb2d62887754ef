"""Layout: which dims of which parameters are cut over which axis, and where the copies are.

A table made of the model's modules, as data. A matrix may be several side by side (queries, keys
and values; gate and value): each *segment* is cut evenly, so that a rank's slice is again such a
matrix, only narrower. What no axis cuts is held by every rank of a stage.

The cuts are those of Megatron (1909.08053, section 3) for dense layers and of GShard (2006.16668)
and MoE Parallel Folding (2504.14960) for experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

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
    cut = {f"{path}.{name}": laid for path, module in _placements_by_module(model) for name, laid in module}
    return {
        name: cut.get(name, Placement(tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
    }


def _placements_by_module(model: nn.Module) -> Iterator[tuple[str, Iterator[tuple[str, Placement]]]]:
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


def _column_parallel(name: str, linear: nn.Linear, *, segments: tuple[int, ...]) -> Iterator[tuple[str, Placement]]:
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
