"""Pipeline parallelism: runs a step's micro-batches through the stages, by PyTorch's schedules.

Every rank of a pipeline reads the same micro-batches, so only hidden states are sent
(``stage_serializer.py``). The last stage computes the loss of the head. Losses of other stages
(balance) are attached to the hidden states they send: an identity whose backward adds 1 to the
gradient of the loss.

Letters: N predicted tokens.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.world import ProcessGroupWorld, World
from moesaic.model.head import HeadLoss
from moesaic.model.transformer import Transformer, packing_of
from moesaic.moe.config import MoE
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.moe.routing_record import RoutingRecord, loss_terms
from moesaic.parallel.partial_forward import forward_blocks, output_of
from moesaic.parallel.pipeline_schedules import torch_pipelining
from moesaic.parallel.pipeline_stages import PipelineStages
from moesaic.parallel.stage_serializer import (
    LocalTokens,
    StageBoundary,
    StageSerializer,
)
from moesaic.parallel.zero import set_gradient_accumulation


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Settings of the loss; ``num_targets`` counts a step's predictions, on all ranks."""

    num_targets: Int[Tensor, ""] | int
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(slots=True)
class MicroBatch:
    """A micro-batch, and the results of this rank's stages.

    ``terms`` are this rank's shares of the loss, detached; ``records`` are those of a step's last
    micro-batch, detached, and of no other. On the last stage, ``loss`` is the
    head's, without its graph, and ``row`` the row of the batch of each prediction.
    """

    batch: Batch
    tokens: LocalTokens
    terms: dict[str, Float[Tensor, ""]]
    records: tuple[RoutingRecord, ...] = ()
    loss: HeadLoss | None = None
    row: Int[Tensor, "N"] | None = None


class StageModule(nn.Module):
    """One stage as a module of tensors; the last one returns this rank's share of the loss.

    ``index`` is the number of the micro-batch in ``pipeline.micro_batches``.
    """

    def __init__(
        self, pipeline: "Pipeline", *, number: int, serializers: Sequence[StageSerializer]
    ) -> None:
        super().__init__()
        self.model, self.pipeline, self.number = pipeline.model, pipeline, number
        self.block_range = pipeline.stages.block_ranges[number]
        self.input_serializer = serializers[number - 1] if number else None
        self.output_serializer = serializers[number] if number < len(serializers) else None

    def forward(self, *received: Tensor, index: Int[Tensor, "1"]) -> Any:
        """Return the tensors for the next stage, or the loss of the micro-batch."""
        pipeline = self.pipeline
        micro, settings = pipeline.micro_batches[int(index)], pipeline.loss_settings
        stage_input = None
        if self.input_serializer is not None:
            stage_input = self.input_serializer.unpack(received, tokens=micro.tokens)
        terms: dict[str, Tensor] = {}
        with settings.autocast():
            end = forward_blocks(
                self.model, micro.batch, blocks=self.block_range, stage_input=stage_input
            )
            if self.output_serializer is None:
                output = output_of(self.model, end, batch=micro.batch)
                loss = self.model.loss(output)
                name = self.model.config.head.loss_name
                terms[name] = loss.total / settings.num_targets
                micro.loss, micro.row = replace(loss, total=loss.total.detach()), output.row
        terms |= loss_terms(end.records, num_micro_batches=len(pipeline.micro_batches))
        objective = torch.stack(list(terms.values())).sum() if terms else torch.zeros(())
        for name, value in {**terms, "objective": objective}.items():
            micro.terms[name] = micro.terms[name] + value.detach().double()
        if micro is pipeline.micro_batches[-1]:  # the others' would all be held at once
            micro.records += tuple(record.detached() for record in end.records)
        if self.training:
            # not after backward: the next micro-batch's forward comes first
            accumulate_routing_stats(self.model, end.records)
        sent: Sequence[Tensor] = (objective,)
        if self.output_serializer is not None:
            term = objective.to(micro.batch.device)
            sent = self.output_serializer.pack(end.stage_output, term=term)
        for tensor in [each for each in sent if each.requires_grad][:1]:
            tensor.register_hook(lambda _: pipeline.backward_begins(self.number))
        return objective if self.output_serializer is None else sent


class Pipeline:
    """This rank's stages of a model after ``stages.remove_other_stages``.

    ``group`` are the ranks of the pipeline, first stage first; ``shared_worlds`` has the world of
    each of ``stages.shared_rank_sets`` that this rank is in. ``micro_batches`` are those of the
    step in progress.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh,
        stages: PipelineStages,
        splits_backward: bool = True,
    ) -> None:
        """Make the pipeline of this rank of a mesh. Collective over the whole mesh.

        ``splits_backward``: a schedule may compute gradients of weights after those of inputs. With
        streamed weights it does not: they are on the device for one pass.
        """
        self.model, self.stages = model, stages
        self._splits_backward = splits_backward
        self.shared_worlds: dict[tuple[int, ...], World] = {}
        for ranks in stages.shared_rank_sets:
            if mesh.coordinates()["pipe"] in ranks:
                line = mesh.ranks("pipe")
                group = mesh.group_of(tuple(line[rank] for rank in ranks))
                self.shared_worlds[ranks] = ProcessGroupWorld(mesh.device, group=group)
        self.group, self.device = mesh.group("pipe"), mesh.device
        self.rank = distributed.get_rank(self.group)
        self.dtype = next(model.parameters()).dtype
        self.micro_batches: tuple[MicroBatch, ...] = ()
        self.loss_settings = LossSettings(1)
        self._boundaries = [
            StageBoundary.after(blocks, config=stages.config) for blocks in stages.block_ranges[:-1]
        ]
        self._cached_schedule: tuple[Any, Any] = (None, None)
        self._backward_passes = Counter[int]()  # of each stage, that are left in the step
        self._zero = mesh.plan.zero

    def forward_backward(
        self, batches: Sequence[Batch], *, loss_settings: LossSettings
    ) -> tuple[MicroBatch, ...]:
        """Accumulate the gradients of this rank's share of the loss. Collective over the pipeline.

        The results' ``terms``, summed over ranks, are those of one process. Call
        ``sum_shared_gradients`` after all other sums of gradients.
        """
        serializers = self._start_step(batches, loss_settings=loss_settings)
        key = (serializers, len(batches))
        if self._cached_schedule[0] != key:
            self._cached_schedule = (key, self._build_schedule(*key))
        self._backward_passes = Counter(dict.fromkeys(self._modules_of_stage, len(batches)))
        index = torch.arange(len(batches))
        self._cached_schedule[1].step(index, index=index, target=index, return_outputs=False)
        return self._finish_step()

    @torch.no_grad()
    def forward_only(
        self, batches: Sequence[Batch], *, loss_settings: LossSettings
    ) -> tuple[MicroBatch, ...]:
        """Compute the losses of any number of batches, without gradients. Collective."""
        serializers = self._start_step(batches, loss_settings=loss_settings)
        ranks, sends = self.stages.rank_of_stage, list[Any]()
        local: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        for number in self.stages.stages_of_rank(self.rank):
            stage = self._stage_module(number, serializers)
            for index in range(len(batches)):
                received = local.pop((number, index), ())
                if number and not received:
                    received = self._receive(serializers[number - 1], rank=ranks[number - 1])
                out = stage(*received, index=torch.tensor([index]))
                if number == len(serializers):
                    continue
                to = ranks[number + 1]
                if to == self.rank:
                    local[number + 1, index] = out
                else:
                    sends += [distributed.isend(t, group=self.group, group_dst=to) for t in out]
        for work in sends:
            work.wait()
        return self._finish_step()

    def backward_begins(self, stage: int) -> None:
        """Note a backward pass of a stage: ZeRO sums a module's gradients in the step's last."""
        self._backward_passes[stage] -= 1
        if not self._zero or self._backward_passes[stage]:
            return
        others = [self._modules_of_stage[each] for each in +self._backward_passes]
        needed = {module for modules in others for module in modules}
        done = [each for each in self._modules_of_stage[stage] if each not in needed]
        set_gradient_accumulation(done, last=True, zero_stage=self._zero)

    @cached_property
    def _modules_of_stage(self) -> dict[int, list[nn.Module]]:
        """The modules that each stage of this rank runs; two may share the embedding."""
        modules = list(self.model.named_modules())
        return {
            stage: [module for path, module in modules if path and self.stages.uses(stage, path)]
            for stage in self.stages.stages_of_rank(self.rank)
        }

    def _start_step(
        self, batches: Sequence[Batch], *, loss_settings: LossSettings
    ) -> tuple[StageSerializer, ...]:
        """Set the step's micro-batches, and return the serializer between each two stages."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens = [self._local_tokens(batch) for batch in batches]
        self.loss_settings, names = loss_settings, loss_term_names(self.stages)
        self.micro_batches = tuple(
            MicroBatch(batch.to(self.device), count, dict.fromkeys(names, zero))
            for batch, count in zip(batches, tokens, strict=True)
        )
        dim = self.stages.config.dim
        return tuple(
            StageSerializer.of(boundary, dim=dim, dtype=self.dtype, tokens=tokens)
            for boundary in self._boundaries
        )

    def _finish_step(self) -> tuple[MicroBatch, ...]:
        micro_batches, self.micro_batches = self.micro_batches, ()
        return micro_batches

    def _local_tokens(self, batch: Batch) -> LocalTokens:
        sides = (batch.source, batch.target)
        packings = (self.model.sequence_sharding(packing_of(rows)) for rows in sides)
        return LocalTokens(*(len(range(p.num_tokens)[p.local_tokens]) for p in packings))

    def _stage_module(self, number: int, serializers: Sequence[StageSerializer]) -> StageModule:
        stage = StageModule(self, number=number, serializers=serializers)
        return stage.train(self.model.training)

    def _build_schedule(self, serializers: Sequence[StageSerializer], micro_batches: int) -> Any:
        """Build PyTorch's schedule over this rank's stages."""
        schedule, numbers = self.stages.schedule, self.stages.stages_of_rank(self.rank)
        stages = [self._torch_stage(number, serializers) for number in numbers]
        return getattr(torch_pipelining(), schedule.torch_name)(
            stages[0] if schedule.stages_per_rank() == 1 else stages,
            n_microbatches=micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def _torch_stage(self, number: int, serializers: Sequence[StageSerializer]) -> Any:
        last = len(serializers)
        # with shapes given, PyTorch does not run the stage to infer them
        index, loss = torch.empty(1, dtype=torch.long), torch.empty((), requires_grad=True)
        return torch_pipelining().PipelineStage(
            self._stage_module(number, serializers),
            number,
            last + 1,
            self.device,
            input_args=serializers[number - 1].empty_buffers("meta") if number else (index,),
            output_args=serializers[number].empty_buffers("meta") if number < last else (loss,),
            group=self.group,
            # else its backward passes are whole, and what is left for later is nothing
            dw_builder=None if self._splits_backward else lambda: _no_weight_pass,
        )

    def _receive(self, serializer: StageSerializer, *, rank: int) -> tuple[Tensor, ...]:
        buffers = tuple(each.detach() for each in serializer.empty_buffers(self.device))
        for buffer in buffers:
            distributed.recv(buffer, group=self.group, group_src=rank)
        return buffers

    def shared_parameters(self) -> list[Tensor]:
        """Return this rank's trained parameters that other pipeline ranks have too."""
        own = [ranks for ranks in self.stages.shared_rank_sets if self.rank in ranks]
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [p for name, p in trained if self.stages.ranks_of(name) in own]

    def sum_shared_gradients(self, *, dtype: torch.dtype) -> None:
        """Sum, in ``dtype``, the gradients that several pipeline ranks have. Collective.

        After all other sums: those of different groups may differ in their last bits, and this one
        makes the copies identical again.
        """
        named = dict(self.model.named_parameters())
        for ranks in self.stages.shared_rank_sets:
            if self.rank in ranks:
                shared = [p for name, p in named.items() if self.stages.ranks_of(name) == ranks]
                self.shared_worlds[ranks].all_reduce_gradients(shared, dtype=dtype)


def _no_weight_pass() -> None:
    """Compute no gradients of weights: the backward pass has."""


def loss_term_names(stages: PipelineStages) -> tuple[str, ...]:
    """Return the names of all terms of the training loss, of every stage."""
    config = stages.config
    names = {config.head.loss_name, "objective"}
    for stack in (config.encoder, config.decoder):
        moe = config.moe_of_stack(stack)
        if isinstance(moe, MoE) and stack.moe_layers:
            names |= {f"loss_{term.name}" for term in moe.balance}
    return tuple(sorted(names))
