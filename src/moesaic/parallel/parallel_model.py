"""Spread: a model that lies over the ranks of a plan, and what a training step asks of it.

Every rank's loss is its share (``moe/batch_group.py``), so a gradient is the sum over all ranks that hold
a copy of its parameter: never a mean, whatever the axes.

Matrices: whole ones for an update that needs them (Muon), of which ranks hold parts.

A bank of experts is a stack: only the last two dims have to be whole, so an expert is never sent to
a rank that does not hold a part of it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from moesaic.checkpoint.snapshot import Shard
from moesaic.core.shapes import Float, Tensor
from moesaic.distributed.collectives import reduce_from_group
from moesaic.distributed.mesh import STAGE_AXES, Mesh
from moesaic.distributed.process_groups import Group
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World, local_tensor
from moesaic.model.transformer import Transformer
from moesaic.optim.gradient_clipping import GradNorm, global_norm, scale_gradients
from moesaic.parallel.batch_ranks import world_over
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.sharding_plan import (
    GradientSync,
    Placement,
    ShardingPlan,
    Spans,
    clip_spans,
    describe_shard,
    local_spans,
    slice_local,
    write_shard,
    zero_dim,
)
from moesaic.parallel.zero import set_gradient_accumulation


class ParallelModel:
    """``model`` as it lies on this rank of ``mesh``; ``sharing`` is by parameter name.

    ``layout`` is that of the whole model.

    ``pipeline`` is what runs it where its blocks lie on several ranks.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh,
        sharding_plan: ShardingPlan,
        gradient_sync: Mapping[str, GradientSync],
        pipeline: Pipeline | None = None,
    ) -> None:
        self.model, self.mesh, self.sharding_plan, self.gradient_sync = (
            model,
            mesh,
            sharding_plan,
            dict(gradient_sync),
        )
        self.pipeline = pipeline
        # before ZeRO shares them out, after other axes have cut them
        self._shapes_before_zero = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.stage_world = world_over(mesh, *STAGE_AXES)
        self.data_world = world_over(mesh, "data")
        place = mesh.coordinates()
        self.counts_tokens = not any(place[axis] for axis in ("pipe", "context", "tensor"))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds every parameter."""
        return self.pipeline is None and all(
            not share.zero_axes
            and not any(self._axis_size(laid, cut.axis) > 1 for cut in laid.sharded_dims)
            for _, _, laid, share in self._parameters()
        )

    def before_backward(self, *, last: bool) -> None:
        """Say that the next micro-batch follows, and whether it is the step's last."""
        if self.mesh.plan.zero:
            set_gradient_accumulation(self.model, last=last, zero_stage=self.mesh.plan.zero)

    def sum_gradients(self) -> None:
        """Make each gradient that of the whole batch. Collective.

        What nothing has asked for has a gradient of zero, on one rank as on many: so weight decay
        treats it alike under every plan.
        """
        for _, parameter, _, _ in self._parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        together: dict[Group, list[Tensor]] = {}
        for _, parameter, laid, share in self._parameters():
            group = self.mesh.group(*share.all_reduce_axes, num_experts=laid.experts)
            if group is not None:
                together.setdefault(group, []).append(parameter)
        for group, parameters in together.items():
            self._group_world(group).all_reduce_gradients(parameters)
        if self.pipeline is not None:
            self.pipeline.sum_shared_gradients()

    def clip_gradients(self, max_norm: float = math.inf) -> GradNorm:
        """Scale all gradients so that their norm as one vector is at most ``max_norm``.

        Each value counts once, wherever it lies. Collective; the same bits on every rank.
        """
        grads = [p.grad for _, p, _, _ in self._parameters() if p.grad is not None]
        norm = global_norm(grads) if self.is_replicated else self._sharded_norm()
        return scale_gradients(
            [local_tensor(g) for g in grads], norm=float(norm), max_norm=max_norm
        )

    def shards(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Shard]:
        """Describe what this rank holds of tensors that lie as the parameters of these names do.

        Without ``tensors``: of the parameters themselves. Loading into the blocks changes them.
        """
        given = tensors if tensors is not None else dict(self.model.named_parameters())
        return {name: self.shard_of(name, tensor) for name, tensor in given.items()}

    def shard_of(self, name: str, tensor: Tensor) -> Shard:
        """Describe a tensor that lies as the parameter of this name does."""
        return describe_shard(
            local_tensor(tensor), self.local_spans(name), shape=self.sharding_plan[name].shape
        )

    @property
    def expert_parameters(self) -> dict[str, int]:
        """The parameters that hold a layer's experts along their first dim, with their number."""
        return {name: laid.experts for name, laid in self.sharding_plan.items() if laid.experts}

    def local_spans(self, name: str) -> tuple[Spans, ...]:
        """Return what this rank holds of each dim of a parameter."""
        laid, shape = self.sharding_plan[name], self._shapes_before_zero[name]
        grid, place = self.mesh.grid(laid.experts), self.mesh.coordinates(laid.experts)
        found = local_spans(laid, grid=grid, place=place)
        group = self.mesh.ranks(*self.gradient_sync[name].zero_axes, num_experts=laid.experts)
        if len(group) == 1:
            return found
        dim = self.zero_dim(name)
        size = -(-shape[dim] // len(group))  # as FSDP2 cuts: torch.chunk
        start = min(group.index(self.mesh.rank) * size, shape[dim])
        length = min(size, shape[dim] - start)
        return clip_spans(found, dim=dim, start=start, length=length)

    def zero_dim(self, name: str) -> int:
        """Return the dim of a parameter that ZeRO cuts, where it does."""
        ranks = self.mesh.size(
            *self.gradient_sync[name].zero_axes, num_experts=self.sharding_plan[name].experts
        )
        return zero_dim(self._shapes_before_zero[name], ranks=ranks)

    def _sharded_norm(self) -> Float[Tensor, ""]:
        square = torch.zeros((), dtype=torch.float64)
        for name, parameter, laid, share in self._parameters():
            if parameter.grad is not None and self._counts_in_norm(name):
                copies = self.mesh.size(*share.all_reduce_axes, num_experts=laid.experts)
                norm = torch.linalg.vector_norm(local_tensor(parameter.grad), dtype=torch.float32)
                square += norm.double().cpu().square() / copies
        return self._group_world(self.mesh.world_group).all_reduce(square).sqrt()

    def _counts_in_norm(self, name: str) -> bool:
        """Whether this rank of a pipeline counts what several of its ranks hold."""
        pipe = self.pipeline
        return pipe is None or pipe.stages.is_first_holder(name, rank=pipe.rank)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, Placement, GradientSync]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter, self.sharding_plan[name], self.gradient_sync[name]

    def _axis_size(self, laid: Placement, axis: str) -> int:
        return self.mesh.grid(laid.experts).axes[axis]

    def _group_world(self, group: Group) -> World:
        device = self.mesh.device
        return SingleProcess(device) if group is None else ProcessGroupWorld(device, group=group)


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
        return [
            slice_local(w, self._local_spans(name, w)) for name, w in zip(names, whole, strict=True)
        ]

    def _gather_matrix(self, name: str, part: Tensor) -> Tensor:
        laid, sharing = (
            self._parallel_model.sharding_plan[name],
            self._parallel_model.gradient_sync[name],
        )
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
        return reduce_from_group(whole.to(self._parallel_model.mesh.device), group=group).to(
            part.device
        )

    def _local_spans(self, name: str, like: Tensor) -> tuple[Spans, ...]:
        stacked: tuple[Spans, ...] = tuple(((0, size),) for size in like.shape[:-2])
        return (*stacked, *self._parallel_model.local_spans(name)[-2:])
