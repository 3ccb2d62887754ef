"""The module of a relative position bias: one table per stack, read by all of its attentions.

Letters: N buckets, H heads.
"""

from torch import nn

from moesaic.nn.attention_scores import RelativeBuckets, ScoreBias
from moesaic.nn.shardable_module import (
    ContextScope,
    ContextSharding,
    ShardableModule,
    ShardedTensor,
    TensorSharding,
)
from moesaic.nn.tensor_parallel_group import TensorParallelGroup


class RelativeBiasModule(ShardableModule):
    """A learned bias per bucket of distances and head (T5, 1910.10683, section 2.1)."""

    def __init__(self, buckets: RelativeBuckets, *, heads: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(buckets.number, heads)

    def forward(self) -> ScoreBias:
        """Return the bias of the scores of this tensor rank's heads."""
        return ScoreBias(self.table.weight, self.buckets)

    def tensor_sharding(self) -> TensorSharding:
        number, heads = self.table.weight.shape
        del number
        return TensorSharding(
            {"table.weight": ShardedTensor(1, (heads,))}, divided={"heads": heads}
        )

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        """Do nothing: each rank has the columns of its heads."""

    def context_sharding(self) -> ContextSharding:
        """Return no bound: every context rank has the whole table."""
        return ContextSharding()

    def use_context_parallel(self, scope: ContextScope) -> None:
        """Do nothing: every context rank has the whole table."""
