"""Tensor parallel: each rank holds some heads and some hidden channels of every dense layer.

Megatron's cut (1909.08053) with the stream between layers dealt over the same ranks (sequence
parallelism, 2205.05198): rows are gathered before the first product and their parts added and dealt
out again after the last one.

Letters: t tokens held here, T tokens of the crew, D model dim.
"""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.dist.collectives import Group, all_gather_rows, group_rank, group_size, reduce_scatter_rows
from moesaic.model.block import FeedForwardBranch
from moesaic.moe.attention import AttentionMixture
from moesaic.nn.attention import CrossAttention, SelfAttention
from moesaic.nn.embedding import Embedding
from moesaic.nn.packing import Packing
from moesaic.parallel.vocabulary import VocabParallelEmbedding


class ProcessGroupTensorParallel:
    """A ``Crew`` of the ranks of a group, in the order in which they hold a part's tokens."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def all_gather_tokens(self, x: Float[Tensor, "t D"], *, packing: Packing) -> Float[Tensor, "T D"]:
        return all_gather_rows(x, group=self._group, sizes=_tokens_by_tensor_rank(packing))

    def reduce_scatter_tokens(self, y: Float[Tensor, "T D"], *, packing: Packing) -> Float[Tensor, "t D"]:
        return reduce_scatter_rows(y, group=self._group, sizes=_tokens_by_tensor_rank(packing))


class SkipBiasLinear(nn.Linear):
    """A linear map whose bias another rank adds; its bias stays a parameter, without gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


def apply_tensor_parallel(model: nn.Module, *, group: Group, vocab_size: int) -> None:
    """Tell the layers, whose parameters are cut already, that they are narrower now."""
    lanes = group_size(group)
    if lanes == 1:
        return
    crew = ProcessGroupTensorParallel(group)
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.heads //= lanes
            module.kv_heads //= lanes
            module.tensor_parallel = crew
        elif isinstance(module, FeedForwardBranch):
            module.tensor_parallel = crew
        elif isinstance(module, Embedding):
            module.backend = VocabParallelEmbedding(group, size=vocab_size)
    if group_rank(group):
        for owner, name, linear in list(row_parallel_linears(model)):
            setattr(owner, name, SkipBiasLinear(linear))


def tensor_parallel_problems(model: nn.Module, *, ranks: int) -> Iterator[str]:
    """Yield a sentence for each reason why a model cannot be cut over so many ranks."""
    for path, module in model.named_modules():
        found: dict[str, int] = {}
        if isinstance(module, AttentionMixture) and ranks > 1:
            yield (
                f"parallel.tensor={ranks} cuts heads, but those of {path} belong to attention "
                "experts: set tensor to 1, or model.attention_experts to NoAttentionExperts"
            )
        if isinstance(module, SelfAttention | CrossAttention):
            found = {"heads": module.heads, "kv_heads": module.kv_heads}
        elif isinstance(module, FeedForwardBranch):
            found = {"hidden channels": module.inner.down.in_features}
        for what, number in found.items():
            if number % ranks:
                yield f"parallel.tensor={ranks} must divide them, but {path} has {number} {what}"


def row_parallel_linears(model: nn.Module) -> Iterator[tuple[Any, str, nn.Linear]]:
    """Yield the linear maps whose bias one of several ranks adds: their owner, name and self."""
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention) and module.out.bias is not None:
            yield module, "out", module.out
        elif isinstance(module, FeedForwardBranch) and module.inner.down.bias is not None:
            yield module.inner, "down", module.inner.down


def _tokens_by_tensor_rank(packing: Packing) -> tuple[int, ...]:
    assert packing.partition is not None, "tokens are dealt out wherever matrices are cut"
    return packing.partition.tensor_sizes
