"""Shardable modules: how tensor and context parallel ranks share a module, declared by the module.

A module that mixes the tokens of a row, or whose matrices tensor ranks share, says here which dims
of its parameters are sharded and what each rank exchanges, or why it cannot be shared. Code in
``parallel/`` calls these methods and does not check the class of a mixer or an attention.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import nn

from moesaic.distributed.process_groups import Group
from moesaic.nn.attention_backend import AttentionBackend
from moesaic.nn.fused_projections import PartlyBiasedLinear
from moesaic.nn.tensor_parallel_group import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """``dim`` of a parameter is sharded; ``segments`` are the lengths concatenated in it.

    A rank's slice has the same share of every segment, in the same order.
    """

    dim: int
    segments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSharding:
    """How tensor ranks share a module (Megatron, 1909.08053, section 3), or why they cannot.

    ``tensors`` are the sharded parameters by their names in the module; others are whole on every
    rank. ``divided`` are the numbers that must divide by the ranks, by what they count.
    ``row_parallel`` are the ``nn.Linear`` modules whose outputs the ranks sum: one rank adds the
    bias. ``refusal`` completes the sentence "Kind of path ..."; None if it can be shared.
    """

    tensors: Mapping[str, ShardedTensor] = field(default_factory=dict)
    divided: Mapping[str, int] = field(default_factory=dict)
    row_parallel: tuple[str, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class ContextSharding:
    """How context ranks share the tokens of a row in a module, or why they cannot.

    ``heads`` bound the ranks where each computes heads of its own (None: nothing does).
    ``refusal`` completes the sentence "Kind of path ...".
    """

    heads: int | None = None
    refusal: str | None = None


@runtime_checkable
class ContextScope(Protocol):
    """The context ranks that share each row, given to a module by ``use_context_parallel``.

    ``packing.partition`` has the tokens of each. ``group`` is for collectives of the module's own.
    """

    @property
    def group(self) -> Group: ...

    def attention_backend(self, *, kv_heads: int) -> AttentionBackend:
        """Return the attention over these ranks for ``kv_heads`` heads of this tensor rank."""
        ...


class ShardableModule(nn.Module):
    """Base of modules that declare how ranks share them; by default they cannot be shared."""

    def tensor_sharding(self) -> TensorSharding:
        """Return how tensor ranks share the whole module."""
        return TensorSharding(refusal="declares no tensor_sharding")

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        """Adapt to parameters that are now slices: numbers of heads, and the collectives."""
        raise NotImplementedError

    def context_sharding(self) -> ContextSharding:
        """Return how context ranks share the rows that the module mixes."""
        return ContextSharding(refusal="needs all tokens of a row on one rank")

    def use_context_parallel(self, scope: ContextScope) -> None:
        """Mix tokens across the ranks of ``scope`` from now on."""
        raise NotImplementedError


class HeadShardedModule(ShardableModule):
    """Base of attentions: tensor ranks share the heads, context ranks by an attention backend."""

    heads: int
    kv_heads: int
    tensor_parallel: TensorParallelGroup
    backend: AttentionBackend

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        self.heads, self.kv_heads = self.heads // ranks, self.kv_heads // ranks
        self.tensor_parallel = group

    def context_sharding(self) -> ContextSharding:
        return ContextSharding(heads=self.heads)

    def use_context_parallel(self, scope: ContextScope) -> None:
        self.backend = scope.attention_backend(kv_heads=self.kv_heads)


def shardable_modules(model: nn.Module) -> Iterator[tuple[str, ShardableModule]]:
    """Yield the path of each shardable module of a model, and the module."""
    for path, module in model.named_modules():
        if isinstance(module, ShardableModule):
            yield path, module


def column_parallel(
    name: str, linear: nn.Linear, *, segments: tuple[int, ...]
) -> dict[str, ShardedTensor]:
    """Each rank computes some of the outputs of a linear (rows of its weight), and their bias."""
    tensors = {f"{name}.weight": ShardedTensor(0, segments)}
    if linear.bias is not None:
        partly = isinstance(linear, PartlyBiasedLinear)
        biased = linear.biased_widths() if partly else segments
        tensors[f"{name}.bias"] = ShardedTensor(0, biased)
    return tensors


def row_parallel(name: str, linear: nn.Linear) -> dict[str, ShardedTensor]:
    """Each rank reads some of the inputs; outputs are summed over ranks, the bias added once."""
    return {f"{name}.weight": ShardedTensor(1, (linear.in_features,))}
