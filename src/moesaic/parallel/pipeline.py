"""Pipeline: the micro-batches of a step through the stages of a model, on PyTorch's schedules.

Every rank of a pipeline has the same micro-batches, so only states travel (``wire.py``); what else
a stage needs it makes of its own copy. The last stage scores. Losses that other stages have of
their own (balance) get their gradient where they are: an identity in the stream whose backward adds
it.

Letters: N predicted tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import PAD, Batch
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.process_groups import Group
from moesaic.distributed.world import ProcessGroupWorld, World
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.moe.routing_record import RoutingRecord, loss_terms
from moesaic.nn.packing import Packing
from moesaic.parallel.partial_forward import forward_blocks, output_of
from moesaic.parallel.pipeline_schedules import torch_pipelining
from moesaic.parallel.pipeline_stages import PipelineStages
from moesaic.parallel.stage_serializer import (
    LocalTokens,
    StageBoundary,
    StageSerializer,
)


@dataclass(frozen=True, slots=True)
class LossSettings:
    """How the last stage scores: ``predicted`` tokens are those of the step on all ranks."""

    num_targets: int
    smoothing: float = 0.0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(slots=True)
class MicroBatch:
    """A micro-batch, and what this rank's stages make of it.

    ``terms`` are shares of the loss, detached. Where the last stage has scored, ``nll`` is each
    predicted token's negative log-likelihood and ``row`` its row of the batch.
    """

    batch: Batch
    tokens: LocalTokens
    terms: dict[str, Float[Tensor, ""]]
    records: tuple[RoutingRecord, ...] = ()
    nll: Float[Tensor, "N"] | None = None
    row: Int[Tensor, "N"] | None = None


@dataclass(slots=True)
class PipelineStep:
    """The step in progress."""

    micro_batches: tuple[MicroBatch, ...] = ()
    loss_settings: LossSettings = field(default_factory=lambda: LossSettings(0))


class StageModule(nn.Module):
    """One stage: tensors in, tensors out; the last one returns this rank's share of the loss.

    ``index`` is the number of the micro-batch in ``job``.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        stages: PipelineStages,
        number: int,
        serializers: Sequence[StageSerializer],
        step: PipelineStep,
    ) -> None:
        super().__init__()
        self.model = model
        self.block_range = stages.block_ranges[number]
        self.input_serializer = serializers[number - 1] if number else None
        self.output_serializer = serializers[number] if number < len(serializers) else None
        self.step = step

    def forward(self, *received: Tensor, index: Int[Tensor, "1"]) -> Any:
        """Pass a micro-batch on, or score it."""
        micro, scoring = self.step.micro_batches[int(index)], self.step.loss_settings
        given = (
            self.input_serializer.unpack(received, tokens=micro.tokens)
            if self.input_serializer
            else None
        )
        terms: dict[str, Tensor] = {}
        with scoring.autocast():
            end = forward_blocks(
                self.model, micro.batch, blocks=self.block_range, stage_input=given
            )
            if self.output_serializer is None:
                output = output_of(self.model, end, batch=micro.batch)
                scored = self.model.loss(output, smoothing=scoring.smoothing)
                terms["cross_entropy"] = scored.total / max(scoring.num_targets, 1)
                micro.nll, micro.row = scored.nll, output.row
        terms |= loss_terms(end.records, num_micro_batches=len(self.step.micro_batches))
        objective = torch.stack(list(terms.values())).sum() if terms else torch.zeros(())
        for name, value in {**terms, "objective": objective}.items():
            micro.terms[name] = micro.terms[name] + value.detach().double()
        micro.records += end.records
        if self.training:
            # now, not after backward: the next micro-batch comes before that
            accumulate_routing_stats(self.model, end.records)
        if self.output_serializer is None:
            return objective
        return self.output_serializer.pack(
            end.stage_output, term=objective.to(micro.batch.source.device)
        )


class Pipeline:
    """This rank's stages of a model that ``stages.remove_other_stages`` has cut, and its two verbs.

    ``group`` are the ranks of the pipeline, first stage first; ``sharing`` has the world of each of
    ``stages.shared_rank_sets`` that this rank is in.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        stages: PipelineStages,
        group: Group,
        shared_worlds: Mapping[tuple[int, ...], World],
        device: torch.device,
    ) -> None:
        self.model, self.stages = model, stages
        self.group, self.shared_worlds, self.device = group, shared_worlds, device
        self.rank = distributed.get_rank(group)
        self.dtype = next(model.parameters()).dtype
        self._term_names = loss_term_names(stages)
        self._boundaries = [
            StageBoundary.after(leg, config=stages.config) for leg in stages.block_ranges[:-1]
        ]
        self._step = PipelineStep()
        self._cached_schedule: tuple[Any, Any] = (None, None)

    @staticmethod
    def from_mesh(mesh: Mesh, *, model: Transformer, stages: PipelineStages) -> "Pipeline":
        """Make the pipeline of this rank of a mesh. Collective over the whole mesh."""
        sharing: dict[tuple[int, ...], World] = {}
        for ranks in stages.shared_rank_sets:
            lists = [[line[rank] for rank in ranks] for line in mesh.dense_grid.groups(("pipe",))]
            group = mesh.new_group(lists)
            if mesh.coordinates()["pipe"] in ranks:
                sharing[ranks] = ProcessGroupWorld(mesh.device, group=group)
        return Pipeline(
            model,
            stages=stages,
            group=mesh.group("pipe"),
            shared_worlds=sharing,
            device=mesh.device,
        )

    @property
    def has_first_stage(self) -> bool:
        """Whether this rank has the first stage: it counts tokens."""
        return self.stages.rank_of_stage[0] == self.rank

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank has the last stage: it scores."""
        return self.stages.rank_of_stage[-1] == self.rank

    def forward_backward(
        self, batches: Sequence[Batch], *, loss_settings: LossSettings
    ) -> tuple[MicroBatch, ...]:
        """Add the gradients of this rank's share of the loss. Collective over the pipeline.

        Sums over ranks of the results' ``terms`` are what one process has. ``sum_shared_gradients``
        comes after whatever else adds gradients up.
        """
        self._start_step(batches, scoring=loss_settings)
        wires = self._serializers()
        if self._cached_schedule[0] != (wires, len(batches)):
            self._cached_schedule = (
                (wires, len(batches)),
                self._build_schedule(wires, micro_batches=len(batches)),
            )
        which = torch.arange(len(batches))
        self._cached_schedule[1].step(which, index=which, target=which, return_outputs=False)
        return self._finish_step()

    @torch.no_grad()
    def forward_only(
        self, batches: Sequence[Batch], *, loss_settings: LossSettings
    ) -> tuple[MicroBatch, ...]:
        """Score batches, any number of them, without gradients. Collective over the pipeline."""
        self._start_step(batches, scoring=loss_settings)
        wires = self._serializers()
        sent: list[Any] = []
        local: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        for number in self.stages.stages_of_rank(self.rank):
            stage = self._stage_module(number, wires=wires)
            for index in range(len(batches)):
                received = local.pop((number, index), ())
                if number and not received:
                    received = self._receive(wires[number - 1], stage=number - 1)
                out = stage(*received, index=torch.tensor([index]))
                if number == len(wires):
                    continue
                if self.stages.rank_of_stage[number + 1] == self.rank:
                    local[number + 1, index] = out
                else:
                    to = self.stages.rank_of_stage[number + 1]
                    sent += [distributed.isend(t, group=self.group, group_dst=to) for t in out]
        for work in sent:
            work.wait()
        return self._finish_step()

    def _start_step(self, batches: Sequence[Batch], *, scoring: LossSettings) -> None:
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        self._step.loss_settings = scoring
        self._step.micro_batches = tuple(
            MicroBatch(
                batch.to(self.device),
                self._local_tokens(batch),
                dict.fromkeys(self._term_names, none),
            )
            for batch in batches
        )

    def _finish_step(self) -> tuple[MicroBatch, ...]:
        micros, self._step.micro_batches = self._step.micro_batches, ()
        return micros

    def _local_tokens(self, batch: Batch) -> LocalTokens:
        """How many tokens of a micro-batch are held here."""
        sides = (batch.source != PAD, (batch.target_in != PAD) | (batch.target_out != PAD))
        packings = [self.model.sequence_sharding(Packing.from_mask(real)) for real in sides]
        source, target = (
            len(range(packing.num_tokens)[packing.local_tokens]) for packing in packings
        )
        return LocalTokens(source, target)

    def _serializers(self) -> tuple[StageSerializer, ...]:
        dim, tokens = self.stages.config.dim, [micro.tokens for micro in self._step.micro_batches]
        return tuple(
            StageSerializer.of(boundary, dim=dim, dtype=self.dtype, tokens=tokens)
            for boundary in self._boundaries
        )

    def _stage_module(self, number: int, *, wires: Sequence[StageSerializer]) -> StageModule:
        stage = StageModule(
            self.model, stages=self.stages, number=number, serializers=wires, step=self._step
        )
        return stage.train(self.model.training)

    def _build_schedule(self, wires: Sequence[StageSerializer], *, micro_batches: int) -> Any:
        """PyTorch's schedule over this rank's stages."""
        schedule = self.stages.schedule
        made = [
            self._torch_stage(number, wires=wires)
            for number in self.stages.stages_of_rank(self.rank)
        ]
        return getattr(torch_pipelining(), schedule.torch_name)(
            made[0] if schedule.stages_per_rank() == 1 else made,
            n_microbatches=micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def _torch_stage(self, number: int, *, wires: Sequence[StageSerializer]) -> Any:
        # shapes are said here, so that nothing is run to find them out
        root, loss = torch.empty(1, dtype=torch.long), torch.empty((), requires_grad=True)
        return torch_pipelining().PipelineStage(
            self._stage_module(number, wires=wires),
            number,
            len(wires) + 1,
            self.device,
            input_args=wires[number - 1].empty_buffers("meta") if number else (root,),
            output_args=wires[number].empty_buffers("meta") if number < len(wires) else (loss,),
            group=self.group,
        )

    def _receive(self, wire: StageSerializer, *, stage: int) -> tuple[Tensor, ...]:
        blanks = tuple(blank.detach() for blank in wire.empty_buffers(self.device))
        for blank in blanks:
            distributed.recv(blank, group=self.group, group_src=self.stages.rank_of_stage[stage])
        return blanks

    def sum_shared_gradients(self) -> None:
        """Give what several ranks hold the sum of their gradients. Collective.

        Last of all sums: what other groups add up, each in an order of its own, would differ in
        its last bits from rank to rank.
        """
        named = dict(self.model.named_parameters())
        for ranks in self.stages.shared_rank_sets:
            if self.rank in ranks:
                held = [
                    p for name, p in named.items() if self.stages.ranks_of_parameter[name] == ranks
                ]
                self.shared_worlds[ranks].all_reduce_gradients(held)


def loss_term_names(stages: PipelineStages) -> tuple[str, ...]:
    """The names of every part of the training loss, on whichever stage it is."""
    config, names = stages.config, {"cross_entropy", "objective"}
    for stack in (config.encoder, config.decoder):
        moe = config.moe_of_stack(stack)
        if isinstance(moe, MoE) and stack.moe_layers:
            names |= {f"loss_{term.name}" for term in moe.balance}
    return tuple(sorted(names))
