"""Tensor parallelism: attention heads, hidden channels and vocabulary rows sharded over ranks.

The linears stay ``nn.Linear`` with weights that ``sharding_plan.py`` shards (column- and
row-parallel, 1909.08053, section 3). This module has the collectives around them, the
vocabulary-parallel embedding and cross-entropy. Between layers the token stream is sharded over the
same ranks (sequence parallelism, 2205.05198): tokens are all-gathered before a column-parallel
linear and reduce-scattered after a row-parallel one. The loss is computed in chunks as in
``ops/cross_entropy.py``: every rank scores all tokens against its own rows of the table, and ranks
exchange maxima, sums and label logits, never logits.

Letters: t tokens held here, T tokens of the tensor parallel group, N predicted tokens held here, M
those of the group, V vocabulary, v rows held here, D model dim.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.distributed.collectives import (
    all_gather_rows,
    copy_to_group,
    reduce_from_group,
    reduce_scatter_rows,
)
from moesaic.distributed.flight_recorder import record_collective
from moesaic.distributed.process_groups import Group, group_rank, group_size
from moesaic.nn.adapter import adapter_of, add_adapter
from moesaic.nn.embedding import Embedding
from moesaic.nn.packing import Packing
from moesaic.nn.shardable_module import ShardableModule, shardable_modules
from moesaic.ops.cross_entropy import TokenLoss, VocabularyShard, cross_entropy


class VocabParallelEmbedding:
    """An ``EmbeddingBackend``: a table of ``size`` rows, sharded by rows over ``group``."""

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
        rows = reduce_from_group(self._lookup_local_rows(ids, table=table), group=self._group)
        return copy_to_group(rows, group=self._group)  # each rank uses it for its own tokens

    def loss(
        self,
        hidden: Float[Tensor, "N D"],
        *,
        table: Float[Tensor, "v D"],
        label: Int[Tensor, "N"],
        smoothing: float,
        z: float,
        sizes: Sequence[int] | None,
    ) -> TokenLoss:
        assert sizes is not None, "each rank of a table needs the labels of the others"
        gathered = all_gather_rows(hidden, group=self._group, sizes=sizes)
        labels = all_gather_rows(label, group=self._group, sizes=sizes)
        # this rank returns the loss of its own tokens, but scores those of all ranks
        first = sum(sizes[: group_rank(self._group)])
        own = slice(first, first + len(label))
        shard = VocabularyShard(
            self._first,
            self._size,
            -(-self._size // group_size(self._group)),
            all_reduce_max=partial(_all_reduce, group=self._group, op=distributed.ReduceOp.MAX),
            all_reduce_sum=partial(_all_reduce, group=self._group, op=distributed.ReduceOp.SUM),
            own=own,
        )
        return cross_entropy(
            gathered, weight=table, label=labels, label_smoothing=smoothing, z_loss=z, shard=shard
        )

    def _lookup_local_rows(
        self, ids: Int[Tensor, "T"], *, table: Float[Tensor, "v D"]
    ) -> Float[Tensor, "T D"]:
        """Return the embeddings of the ids whose rows are held here, zeros for the others."""
        row = ids - self._first
        local = (row >= 0) & (row < table.shape[0])
        return F.embedding(row.where(local, 0), table) * local[:, None]


def _all_reduce(values: Tensor, *, group: Group, op: Any) -> Tensor:
    with record_collective("all_reduce", group=group):
        distributed.all_reduce(values, op=op, group=group)
    return values


class ProcessGroupTensorParallel:
    """The ``TensorParallelGroup`` of a process group, whose ranks hold consecutive tokens."""

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
    """Row-parallel linear whose bias another rank adds; the bias stays, without gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        if (adapter := adapter_of(linear)) is not None:
            add_adapter(self, adapter)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


def apply_tensor_parallel(model: nn.Module, *, group: Group, vocab_size: int) -> None:
    """Adapt layers to their sharded parameters: head counts, and the communication of each."""
    ranks = group_size(group)
    if ranks == 1:
        return
    tensor_parallel = ProcessGroupTensorParallel(group)
    for module in model.modules():
        if isinstance(module, ShardableModule):
            module.use_tensor_parallel(tensor_parallel, ranks=ranks)
        elif isinstance(module, Embedding):
            module.backend = VocabParallelEmbedding(group, size=vocab_size)
    if group_rank(group):
        for owner, name, linear in list(row_parallel_linears(model)):
            setattr(owner, name, SkipBiasLinear(linear))


def tensor_parallel_problems(model: nn.Module, *, ranks: int) -> Iterator[str]:
    """Yield a sentence for each reason why a model cannot be sharded over ``ranks``."""
    for path, module in shardable_modules(model) if ranks > 1 else ():
        sharding = module.tensor_sharding()
        if sharding.refusal is not None:
            kind = type(module).__name__
            yield (
                f"parallel.tensor={ranks}: {kind} of {path} {sharding.refusal}: set tensor to "
                "1, or choose another mixer (model.mixers)"
            )
        for what, number in sharding.divided.items():
            if number % ranks:
                yield f"parallel.tensor={ranks} must divide them, but {path} has {number} {what}"


def row_parallel_linears(model: nn.Module) -> Iterator[tuple[Any, str, nn.Linear]]:
    """Yield (owner, name, linear) of the row-parallel linears with a bias: one rank adds it."""
    for _, module in shardable_modules(model):
        for path in module.tensor_sharding().row_parallel:
            parent, _, name = path.rpartition(".")
            linear = module.get_submodule(path)
            if isinstance(linear, nn.Linear) and linear.bias is not None:
                yield module.get_submodule(parent), name, linear


def _tokens_by_tensor_rank(packing: Packing) -> tuple[int, ...]:
    assert packing.partition is not None, (
        "the token stream is sharded wherever tensor parallelism is"
    )
    return packing.partition.tensor_sizes
