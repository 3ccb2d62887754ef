"""Parallel model: a sharded model, as training steps, checkpoints and optimizers use it."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import nn

from moesaic.checkpoint.snapshot import Shard
from moesaic.core.shapes import Float, Tensor
from moesaic.distributed.mesh import STAGE_AXES, Mesh
from moesaic.distributed.world import local_tensor
from moesaic.memory.tensor_store import Access, Part, Place
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.ops.blockwise_quantization import blocks_per_row
from moesaic.ops.stochastic_rounding import ShardPosition
from moesaic.optim.gradient_clipping import GradNorm
from moesaic.optim.gradients import Gradients, ResidentGradients
from moesaic.parallel.batch_ranks import group_world, world_over
from moesaic.parallel.gradient_sums import GradientSums, ReplicatedParameter
from moesaic.parallel.parameter_streaming import ParameterStream
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.precision import Precision
from moesaic.parallel.sharding_plan import (
    GradientSync,
    Placement,
    ShardingPlan,
    Spans,
    clip_spans,
    describe_shard,
    local_spans,
    spans_of_blocks,
    zero_dim,
)
from moesaic.parallel.zero import set_gradient_accumulation


class ParallelModel:
    """A model under a parallel plan: ``model`` is this rank's part of it on ``mesh``.

    A rank's loss is its share of the batch's loss (``moe/batch_group.py``), so a gradient is the
    sum over all ranks with a copy of its parameter, never a mean. ``sharding_plan`` is that of the
    whole model, ``gradient_sync`` is by parameter name, and ``pipeline`` runs the stages if there
    are several.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh,
        precision: Precision,
        sharding_plan: ShardingPlan,
        gradient_sync: Mapping[str, GradientSync],
        pipeline: Pipeline | None = None,
    ) -> None:
        self.model, self.mesh, self.sharding_plan = model, mesh, sharding_plan
        self.precision = precision
        self.gradient_sync, self.pipeline = dict(gradient_sync), pipeline
        self.gradients: Gradients = ResidentGradients()
        self.unsaved: frozenset[str] = frozenset()  # parameters that checkpoints leave out
        self.parameter_stream: ParameterStream | None = None  # of a plan with parameters on a tier
        self._on_complete: Callable[[nn.Parameter], None] | None = None
        self._complete: list[nn.Parameter] = []  # but still on the device, to be released
        self._is_last_backward = False
        # the shapes of a DTensor are those before ZeRO shards it, after other axes have
        self._shapes_before_zero = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.stage_world = world_over(mesh, *STAGE_AXES)
        self.data_world = world_over(mesh, "data")
        coordinates = mesh.coordinates()
        # the other ranks of these axes read the same rows
        self.counts_tokens = not any(coordinates[a] for a in ("pipe", "context", "tensor"))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds every parameter."""
        return self.pipeline is None and all(
            not sync.zero_axes
            and self.mesh.size(
                *(dim.axis for dim in placement.sharded_dims), num_experts=placement.num_experts
            )
            == 1
            for _, _, placement, sync in self._parameters()
        )

    def before_backward(self, *, last: bool) -> None:
        """Prepare the sums of gradients for a micro-batch; ``last``: it is the step's last.

        A pipeline, once for all micro-batches, has none that is last: it tells by stage.
        """
        self._is_last_backward = last
        sums = self._gradient_sums  # made before FSDP2 gathers parameters: called before forward
        if last and isinstance(self.gradients, ResidentGradients):
            sums.before_last_backward()
        if self.mesh.plan.zero:
            dtype = self.precision.gradient_dtype
            # FSDP2 adds a gradient of the parameter's dtype to what is there
            self.gradients.prepare(
                [p for p in self.model.parameters() if p.dtype != dtype], dtype=dtype
            )
            modules = self.model.modules()
            set_gradient_accumulation(modules, last=last, zero_stage=self.mesh.plan.zero)

    def sum_gradients(self) -> None:
        """Sum each gradient over the ranks that share the batch. Collective.

        A parameter that no backward pass reached has a gradient of zero, with one process as with
        many: weight decay is then the same under every plan.
        """
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients.complete(trainable, dtype=self.precision.gradient_dtype)
        self._gradient_sums.finish(self.gradients)
        self._is_last_backward, self._complete = False, []
        if self.pipeline is not None:
            shared = self.pipeline.shared_parameters()
            with self.gradients.attached(shared, access=Access.UPDATE):
                self.pipeline.sum_shared_gradients(dtype=self.precision.reduce_dtype)

    @cached_property
    def _gradient_sums(self) -> GradientSums:
        """Made in the first step: allocating a model's shards replaces its parameters."""
        return GradientSums(
            list(self._replicated_parameters()),
            device=self.mesh.device,
            dtype=self.precision.reduce_dtype,
            timeout_s=self.mesh.timeout_s,
            on_sum=self._complete_gradient,
        )

    def when_complete(self, callback: Callable[[nn.Parameter], None]) -> None:
        """Call ``callback`` with each parameter whose gradient of a step is complete.

        That is during the step's last backward pass, or when it was summed over ranks, and not
        before streamed weights are in their tier again. Not for stages of a pipeline.
        """
        self._on_complete = callback
        if self.parameter_stream is not None:
            self.parameter_stream.move_to_tier()  # its hooks come first
        summed = {each.parameter for each in self._replicated_parameters()}

        def accumulated(parameter: nn.Parameter) -> None:
            if self._is_last_backward:
                self._complete_gradient(parameter)

        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter not in summed:
                parameter.register_post_accumulate_grad_hook(accumulated)

    def _complete_gradient(self, parameter: nn.Parameter) -> None:
        if self._on_complete is None:
            return
        stream, waiting = self.parameter_stream, [*self._complete, parameter]
        in_use = stream.in_use if stream is not None else frozenset[nn.Parameter]()
        self._complete = [each for each in waiting if each in in_use]
        for each in waiting:
            if each not in in_use:
                self._on_complete(each)

    def _replicated_parameters(self) -> Iterator[ReplicatedParameter]:
        for _, parameter, placement, sync in self._parameters():
            ranks = self.mesh.ranks(*sync.all_reduce_axes, num_experts=placement.num_experts)
            if parameter.requires_grad and len(ranks) > 1:
                yield ReplicatedParameter(parameter, ranks, bool(sync.zero_axes))

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and this rank's part of each gradient, one at a time."""
        for name, parameter in self.model.named_parameters():
            if self.gradients.has(parameter):
                fetched = self.gradients.fetch([(Part(name), parameter)], place=Place.HOST)
                try:
                    yield name, fetched.wait()[0]
                finally:  # a search may end at the first one that it finds
                    fetched.release()

    def clip_gradients(self, max_norm: float = math.inf) -> GradNorm:
        """Scale all gradients so that their global norm is at most ``max_norm``.

        Each value counts once, however many ranks hold it. Collective; identical on every rank.
        """
        parameters = [p for _, p, _, _ in self._parameters() if self.gradients.has(p)]
        if not self.is_replicated:
            norm = self._sharded_norm()
        elif parameters:
            norm = torch.stack(self.gradients.norms(parameters)).norm()
        else:
            norm = torch.zeros(())
        return self.gradients.clip(parameters, norm=float(norm), max_norm=max_norm)

    def shards(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Shard]:
        """Return this rank's shards of tensors that are sharded as the parameters of these names.

        Without ``tensors``: of the parameters, whose memory the shards share.
        """
        given = tensors if tensors is not None else dict(self.model.named_parameters())
        return {name: self.shard_of(name, tensor) for name, tensor in given.items()}

    def shard_of(self, name: str, tensor: Tensor, *, block: int = 1) -> Shard:
        """Return this rank's shard of a tensor that is sharded as the parameter of this name.

        It has a number for each ``block`` values of a row of the parameter.
        """
        shape, spans = self.sharding_plan[name].shape, self.local_spans(name)
        if block > 1:
            shape = (*shape[:-1], blocks_per_row(shape[-1], block=block))
            spans = (*spans[:-1], spans_of_blocks(spans[-1], block=block))
        return describe_shard(local_tensor(tensor), spans, shape=shape)

    @property
    def expert_parameters(self) -> dict[str, int]:
        """The parameters whose first dim is a layer's experts, with the number of experts."""
        plan = self.sharding_plan.items()
        saved = ((name, each) for name, each in plan if name not in self.unsaved)
        return {name: each.num_experts for name, each in saved if each.num_experts}

    def saved_weights(self) -> dict[str, Tensor]:
        """Return the weights and buffers of this rank that are saved, by name. Not copied."""
        weights = export_weights(self.model).items()
        return {name: tensor for name, tensor in weights if name not in self.unsaved}

    def local_spans(self, name: str, *, rank: int | None = None) -> tuple[Spans, ...]:
        """Return the spans of each dim of a parameter that this rank holds, or another ``rank``."""
        placement, rank = self.sharding_plan[name], self.mesh.rank if rank is None else rank
        grid = self.mesh.grid(placement.num_experts)
        spans = local_spans(placement, grid=grid, coordinates=grid.coordinates(rank))
        ranks = grid.group(rank, self.gradient_sync[name].zero_axes)
        if len(ranks) == 1:
            return spans
        dim = self.zero_dim(name)
        length = sum(size for _, size in spans[dim])
        size = -(-length // len(ranks))  # FSDP2 shards as torch.chunk does
        start = min(ranks.index(rank) * size, length)
        return clip_spans(spans, dim=dim, start=start, length=min(size, length - start))

    def position_of(self, name: str) -> ShardPosition:
        """Return where this rank's shard of a parameter lies in the whole one."""
        return ShardPosition(self.local_spans(name), self.sharding_plan[name].shape)

    def zero_dim(self, name: str) -> int:
        """Return the dim along which ZeRO shards a parameter, where it does."""
        axes, experts = self.gradient_sync[name].zero_axes, self.sharding_plan[name].num_experts
        ranks = self.mesh.size(*axes, num_experts=experts)
        return zero_dim(self._shapes_before_zero[name], ranks=ranks)

    def _sharded_norm(self) -> Float[Tensor, ""]:
        pipe, device = self.pipeline, self.mesh.device
        copies: dict[Tensor, int] = {}
        for name, parameter, placement, sync in self._parameters():
            # of the pipeline ranks that hold a parameter together, the first counts it
            counts = pipe is None or pipe.stages.is_first_holder(name, rank=pipe.rank)
            if counts and self.gradients.has(parameter):
                axes, experts = sync.all_reduce_axes, placement.num_experts
                copies[parameter] = self.mesh.size(*axes, num_experts=experts)
        # a copy for each rank: the norms stay on the device, and the host reads their sum once
        shares = torch.tensor(list(copies.values()), dtype=torch.float64).to(device)
        norms = self.gradients.norms(list(copies))
        squares = torch.stack(norms).to(device).double().square() if norms else shares
        world = group_world(self.mesh.world_group, device=device)
        return world.all_reduce((squares / shares).sum()).sqrt()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, Placement, GradientSync]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter, self.sharding_plan[name], self.gradient_sync[name]
