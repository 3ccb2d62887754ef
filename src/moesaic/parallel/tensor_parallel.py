"""Vocabulary: a table cut by rows over the ranks of a group, and the loss over it.

Megatron's parallel embedding and cross-entropy (1909.08053, section 3), in chunks as in
``ops/cross_entropy.py``: every rank scores all tokens of the group against its own rows, and only
maxima, sums and the label's logit travel, never logits.

Letters: T tokens, t tokens held here, N predicted tokens held here, M those of the group, V
vocabulary, v rows held here, D model dim.

Tensor parallel: each rank holds some heads and some hidden channels of every dense layer.

Megatron's cut (1909.08053) with the stream between layers dealt over the same ranks (sequence
parallelism, 2205.05198): rows are gathered before the first product and their parts added and dealt
out again after the last one.

Letters: t tokens held here, T tokens of the crew, D model dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import (
    all_gather_rows,
    copy_to_group,
    reduce_from_group,
    reduce_scatter_rows,
)
from moesaic.distributed.flight_recorder import record_collective
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.model.block import FeedForwardBranch
from moesaic.moe.attention_experts import AttentionMixture
from moesaic.nn.attention import CrossAttention, SelfAttention
from moesaic.nn.embedding import Embedding
from moesaic.nn.packing import Packing
from moesaic.ops.cross_entropy import CHUNK_ELEMENTS, TokenLoss


class VocabParallelEmbedding:
    """A ``EmbeddingBackend`` of ``size`` rows in all, of which each rank of ``group`` holds a run."""

    def __init__(self, group: Group, *, size: int) -> None:
        self._group, self._size = group, size
        self._first = size * group_rank(group) // group_size(group)

    def embed_tokens(
        self, ids: Int[Tensor, "T"], *, table: Float[Tensor, "v D"], packing: Packing
    ) -> Float[Tensor, "t D"]:
        assert packing.partition is not None
        rows = self._lookup_local_rows(ids[packing.gathered_tokens], table=table)
        return reduce_scatter_rows(rows, group=self._group, sizes=packing.partition.tensor_sizes)

    def embed_replicated(
        self, ids: Int[Tensor, "B"], *, table: Float[Tensor, "v D"]
    ) -> Float[Tensor, "B D"]:
        found = reduce_from_group(self._lookup_local_rows(ids, table=table), group=self._group)
        return copy_to_group(found, group=self._group)  # each rank uses it for tokens of its own

    def loss(
        self,
        hidden: Float[Tensor, "N D"],
        *,
        table: Float[Tensor, "v D"],
        label: Int[Tensor, "N"],
        smoothing: float,
        z: float,
    ) -> TokenLoss:
        ranks = group_size(self._group)
        here = torch.tensor([len(label)], device=label.device)
        sizes = all_gather_rows(here, group=self._group, sizes=[1] * ranks).tolist()
        every = all_gather_rows(hidden, group=self._group, sizes=sizes)
        labels = all_gather_rows(label, group=self._group, sizes=sizes)
        # this rank's loss is that of its own tokens, but its rows are scored by all
        first = sum(sizes[: group_rank(self._group)])
        own = slice(first, first + len(label))
        terms = _LossTerms(self._group, self._first, self._size, smoothing, z)
        total, nll = _VocabParallelCrossEntropy.apply(every, table, labels, own, terms)
        return TokenLoss(total, nll)

    def _lookup_local_rows(
        self, ids: Int[Tensor, "T"], *, table: Float[Tensor, "v D"]
    ) -> Float[Tensor, "T D"]:
        place = ids - self._first
        held = (place >= 0) & (place < table.shape[0])
        return F.embedding(place.where(held, 0), table) * held[:, None]


class _LossTerms:
    """What a chunk's loss needs beside logits and labels."""

    def __init__(self, group: Group, first: int, size: int, smoothing: float, z: float) -> None:
        self.group, self.first, self.size = group, first, size
        self.smoothing, self.z = smoothing, z


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass. Every rank's own loss must reach ``backward`` with
    the same factor (a loss is a share, ``moe/batch_group.py``): rows are scored for others, too.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, weight, label, own, terms = inputs
        table = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(table, dtype=torch.float32)
        losses = torch.empty(len(label), device=hidden.device)
        nll = torch.empty_like(losses)
        step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[0]))
        for start in range(0, len(label), step):
            span = slice(start, start + step)
            logits = (hidden[span] @ table.t()).float()
            losses[span], nll[span], grad = _chunk_loss(logits, label[span], terms)
            grad = grad.to(hidden.dtype)
            grad_hidden[span] = grad @ table
            grad_weight += (grad.t() @ hidden[span]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        nll = nll[own].clone()
        ctx.mark_non_differentiable(nll)
        return losses[own].sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden * scale.to(grad_hidden.dtype), weight, None, None, None


def _chunk_loss(
    logits: Float[Tensor, "M v"], label: Int[Tensor, "M"], terms: _LossTerms
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses and negative log-likelihoods [M], and this rank's gradient of the logits."""
    place = label - terms.first
    held = (place >= 0) & (place < logits.shape[1])
    place = place.where(held, 0)[:, None]
    most = _all_reduce(logits.amax(1), terms.group, distributed.ReduceOp.MAX)
    power = (logits - most[:, None]).exp_()
    at_label = logits.gather(1, place)[:, 0] * held
    sums = torch.stack([power.sum(1), at_label, logits.sum(1)])
    total, at_label, whole = _all_reduce(sums, terms.group, distributed.ReduceOp.SUM)
    lse = total.log() + most
    nll, smoothing, z = lse - at_label, terms.smoothing, terms.z
    loss = (1 - smoothing) * nll + smoothing * (lse - whole / terms.size) + z * lse.square()
    grad = power.div_(total[:, None]).mul_((1 + 2 * z * lse)[:, None])
    grad.sub_(smoothing / terms.size)
    hit = (smoothing - 1) * held.to(grad.dtype)
    return loss, nll, grad.scatter_add_(1, place, hit[:, None])


def _all_reduce(values: Tensor, group: Group, op: Any) -> Tensor:
    with record_collective("all_reduce", group=group):
        distributed.all_reduce(values, op=op, group=group)
    return values


class ProcessGroupTensorParallel:
    """A ``TensorParallelGroup`` of the ranks of a group, in the order in which they hold a part's tokens."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def all_gather_tokens(
        self, x: Float[Tensor, "t D"], packing: Packing, /
    ) -> Float[Tensor, "T D"]:
        return all_gather_rows(x, group=self._group, sizes=_tokens_by_tensor_rank(packing))

    def reduce_scatter_tokens(
        self, y: Float[Tensor, "T D"], packing: Packing, /
    ) -> Float[Tensor, "t D"]:
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
