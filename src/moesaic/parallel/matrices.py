"""Matrices: whole ones for an update that needs them (Muon), of which ranks hold parts.

A bank of experts is a stack: only the last two dims have to be whole, so an expert is never sent to
a rank that does not hold a part of it.
"""

from collections.abc import Sequence

from moesaic.core.shapes import Float, Tensor
from moesaic.dist.collectives import reduce_from_group
from moesaic.parallel.slices import Spans, write_shard, describe_shard, slice_local
from moesaic.parallel.spread import ParallelModel


class ShardedMatrices:
    """Part of an optimizer (``optim.update.Matrices``): fetch and hand back by parameter name."""

    def __init__(self, parallel_model: ParallelModel) -> None:
        self._parallel_model = parallel_model

    def all_gather_matrices(
        self, names: Sequence[str], parts: Sequence[Float[Tensor, "*E m n"]]
    ) -> list[Float[Tensor, "*E M N"]]:
        """Return the matrices that these are parts of. Collective, one matrix or bank at a time."""
        return [self._gather_matrix(name, part) for name, part in zip(names, parts, strict=True)]

    def local_shards(
        self, names: Sequence[str], whole: Sequence[Float[Tensor, "*E M N"]]
    ) -> list[Float[Tensor, "*E m n"]]:
        """Return this rank's parts of whole matrices."""
        return [slice_local(w, self._local_spans(name, w)) for name, w in zip(names, whole, strict=True)]

    def _gather_matrix(self, name: str, part: Tensor) -> Tensor:
        laid, sharing = self._parallel_model.sharding_plan[name], self._parallel_model.gradient_sync[name]
        shape = (*part.shape[:-2], *laid.shape[-2:])
        held = self._local_spans(name, part)
        matrix = range(len(shape) - 2, len(shape))
        axes = [cut.axis for cut in laid.sharded_dims if cut.dim in matrix]
        axes += sharing.zero_axes if self._parallel_model.zero_dim(name) in matrix else ()
        if self._parallel_model.mesh.size(*axes, num_experts=laid.experts) == 1:
            return part
        whole = part.new_zeros(shape)
        write_shard(whole, describe_shard(part, held, shape=shape))
        group = self._parallel_model.mesh.group(*axes, num_experts=laid.experts)
        # the parts do not overlap, so a sum with zeros is exact; on the device, where NCCL reaches
        return reduce_from_group(whole.to(self._parallel_model.mesh.device), group=group).to(part.device)

    def _local_spans(self, name: str, like: Tensor) -> tuple[Spans, ...]:
        stacked: tuple[Spans, ...] = tuple(((0, size),) for size in like.shape[:-2])
        return (*stacked, *self._parallel_model.local_spans(name)[-2:])
