"""Measured step: one training step of one rank on fake tensors, of a model's kinds of blocks.

The step is the real one, as in ``dry_run.py``, but of each kind of block one is run
(``block_chain.py``), and of the ranks as few as have the same axes. It is divided into spans: the
forward and the backward pass of each block, and what is between stacks. ``step_cost.py`` puts the
spans of the whole model together.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moesaic.core.shapes import Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.allocation_ledger import AllocationLedger
from moesaic.distributed.communication_counter import CommunicationCounter, SentCall
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.simulation import SharedChunks, SimulatedRank, fake_process_group
from moesaic.model.block import BlockState
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import RunBlock, Transformer
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.ops.chunk_sizes import ChunkSizes, use_chunk_sizes
from moesaic.optim.optimizer import Optimizer
from moesaic.parallel.activation_checkpointing import NoActivationCheckpointing
from moesaic.parallel.activation_offload import SavedStorages, slot_bytes
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.precision import Precision
from moesaic.parallel.trainable_parameters import TrainableParameters
from moesaic.parallel.zero import set_gradient_accumulation
from moesaic.planner.block_chain import STACKS, BlockChain, ChainPlace
from moesaic.planner.cost_entries import Phase
from moesaic.planner.dry_run import dummy_batch, mesh_groups, with_round_robin_routing
from moesaic.planner.operation_recorder import Operation, OperationRecorder


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a step: bytes at its end and at most, beside those at its start, and its work.

    ``saved`` are the bytes of the storages that an activation offload moves, ``slots`` those of
    their places in a tier; both are only measured for one.
    """

    phase: Phase
    place: ChainPlace
    change: int
    peak: int
    operations: Counter[Operation] = field(repr=False)
    sent: Counter[SentCall] = field(repr=False)
    saved: int = 0
    slots: int = 0

    def with_more(self, size: int) -> "Span":
        """Return the span with so many more bytes at its end."""
        return replace(self, change=self.change + size) if size else self


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """The spans of each kind of micro-batch (first, later, last) and of the optimizer's update."""

    micro_batches: tuple[tuple[Span, ...], ...]
    update: Span


@dataclass(frozen=True, slots=True)
class MeasuredPart:
    """What is run: a model's blocks under a plan with few ranks.

    ``is_pipelined``: routing records are dropped by each block, as pipeline stages do.
    ``offloads``: what an activation offload moves is counted.
    """

    config: ModelConfig
    chain: BlockChain
    parallel: ParallelConfig
    sizes: BatchDims
    optimizer: Optimizer
    precision: Precision
    chunks: ChunkSizes
    trainable: TrainableParameters
    busiest_share: float | None = None
    is_pipelined: bool = False
    offloads: bool = False

    def measure(self, *, last: Sequence[bool]) -> MeasuredStep:
        """Run a step whose micro-batches are the step's last where ``last`` is true."""
        plan, recorder = self.parallel.plan, OperationRecorder()
        parallel = self.parallel.replace(activation_checkpointing=NoActivationCheckpointing())
        with (
            fake_process_group(plan.world_size, rank=0),
            SimulatedRank(recorder) as simulation,
            simulation.ledger.watch_resizes(),
            use_chunk_sizes(self.chunks),
        ):
            config = with_round_robin_routing(self.config, busiest_share=self.busiest_share)
            model = Transformer.without_values(config, layers=self.chain.run)
            with self._numbered_as_whole(model):
                self.trainable.attach(model)
            mesh = Mesh(
                plan,
                rank=0,
                device=torch.device("cpu"),
                expert_counts=expert_counts(model),
            )
            with SharedChunks():
                parallel_model = parallelize_on_mesh(
                    model, parallel=parallel, mesh=mesh, precision=self.precision
                )
            with self._numbered_as_whole(model):
                self.parallel.activation_checkpointing.apply(model)
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(self.trainable.includes(name))
            counted = _CountedSaves(model.run_block)
            if self.offloads:
                model.run_block = counted
            for module in model.modules():
                if isinstance(module, FSDPModule):  # it drops what it was made of at first use
                    module.unshard()
                    module.reshard()
            simulation.counter = CommunicationCounter(axes=mesh_groups(mesh))
            recording = _Recording(simulation.ledger, recorder, simulation.counter, counted)
            blocks = _MarkedBlocks(model, self.chain, recording, drops_records=self.is_pipelined)
            model.run_block = blocks
            batch = dummy_batch(self.config, self.sizes)
            spans = tuple(recording.micro_batch(parallel_model, batch, last=each) for each in last)
            return MeasuredStep(spans, recording.update(parallel_model, self.optimizer))

    @contextmanager
    def _numbered_as_whole(self, model: Transformer) -> Iterator[None]:
        """Give the blocks that are run their places in the whole model."""
        stacks = {side: model.get_submodule(side) for side in STACKS}
        for side, stack in stacks.items():
            whole: list[nn.Module] = [nn.Identity() for _ in self.chain.representative[side]]
            for number, block in zip(self.chain.run[side], stack.children(), strict=True):
                whole[number] = block
            model.add_module(side, nn.ModuleList(whole))
        yield
        for side, stack in stacks.items():
            model.add_module(side, stack)


class _Recording:
    """Divides what happens into spans; ``begin`` ends one and starts the next."""

    def __init__(
        self,
        ledger: AllocationLedger,
        recorder: OperationRecorder,
        counter: CommunicationCounter,
        saves: "_CountedSaves",
    ) -> None:
        self._ledger, self._recorder, self._counter = ledger, recorder, counter
        self._saves = saves
        self._phase, self._place, self._start = Phase.FORWARD, ChainPlace(""), 0
        self._sent: Counter[SentCall] = Counter()
        self.spans: list[Span] = []
        self.dropped_losses: list[Tensor] = []

    def begin(self, phase: Phase, place: ChainPlace) -> None:
        """End the span in progress and start another."""
        self._end()
        self._phase, self._place = phase, place

    def micro_batch(
        self, parallel_model: ParallelModel, batch: Batch, *, last: bool
    ) -> tuple[Span, ...]:
        """Run forward and backward as ``train/step.py`` does, and return the spans."""
        model = parallel_model.model
        self._restart(Phase.FORWARD, ChainPlace(_first_stack(model)))
        if zero := parallel_model.mesh.plan.zero:  # sums of replicated gradients are arithmetic
            set_gradient_accumulation(model.modules(), last=last, zero_stage=zero)
        with parallel_model.precision.autocast(batch.device):
            output = model(batch)
            loss = model.loss(output)
        terms = [value for record in output.records for value in record.losses.values()]
        terms += self.dropped_losses
        objective = torch.stack([loss.total, *terms]).sum()
        self.begin(Phase.BACKWARD, ChainPlace("head"))
        objective.backward()
        accumulate_routing_stats(model, output.records)
        del output, loss, terms, objective
        self.dropped_losses = []
        self._end()
        return tuple(self.spans)

    def update(self, parallel_model: ParallelModel, optimizer: Optimizer) -> Span:
        """Update the parameters twice, and return the span of the second time."""
        model, precision = parallel_model.model, parallel_model.precision
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        built = optimizer.build(
            model.named_parameters(),
            kinds=model.parameter_kinds(),
            master_weights=precision.master_weights,
        )
        built.step()
        self._restart(Phase.UPDATE, ChainPlace("update"))
        built.step()
        self._end()
        return self.spans[-1]

    def _restart(self, phase: Phase, place: ChainPlace) -> None:
        self._end()
        self.spans, self._phase, self._place = [], phase, place

    def _end(self) -> None:
        ledger = self._ledger
        sent = self._counter.calls()
        self.spans.append(
            Span(
                self._phase,
                self._place,
                ledger.live_bytes - self._start,
                ledger.peak_bytes - self._start,
                self._recorder.counts,
                sent - self._sent,
                sum(self._saves.sizes),
                sum(map(slot_bytes, self._saves.sizes)),
            )
        )
        self._saves.sizes = []
        ledger.reset_peak()
        self._recorder.counts = Counter()
        self._start, self._sent = ledger.live_bytes, sent


class _CountedSaves:
    """Runs blocks and notes the sizes of the storages that an activation offload would move."""

    def __init__(self, run_block: RunBlock) -> None:
        self._run_block = run_block
        self.sizes: list[int] = []

    def __call__(self, block: nn.Module, state: BlockState, **inputs: Any) -> BlockState:
        saved = SavedStorages[None]()

        def pack(tensor: Tensor) -> Tensor:
            size = tensor.untyped_storage().nbytes()
            saved.find(tensor, make=lambda: self.sizes.append(size))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return self._run_block(block, state, **inputs)


class _MarkedBlocks:
    """Runs blocks as the model did, and begins a span at each, in forward and in backward."""

    def __init__(
        self, model: Transformer, chain: BlockChain, recording: _Recording, *, drops_records: bool
    ) -> None:
        self._run: RunBlock = model.run_block
        self._drops_records = drops_records
        self._sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._recording = recording
        self._places = {
            block: ChainPlace(side, number)
            for side in STACKS
            for block, number in zip(
                model.get_submodule(side).children(), chain.run[side], strict=True
            )
        }
        self._last = {side: numbers[-1:] for side, numbers in chain.run.items()}

    def __call__(self, block: nn.Module, state: BlockState, **inputs: Any) -> BlockState:
        place, recording = self._places[block], self._recording
        before = ChainPlace(place.stack)
        if place.block == 0:
            _on_gradient(state.x, lambda: recording.begin(Phase.BACKWARD, before))
        recording.begin(Phase.FORWARD, place)
        state = self._run(block, state, **inputs)
        if self._drops_records:
            losses = (record.losses.values() for record in state.records)
            recording.dropped_losses += chain.from_iterable(losses)
            state = replace(state, records=())
            for module in self._sharded:  # a stage's blocks are called apart: FSDP2 then frees it
                module._get_fsdp_state()._comm_ctx.all_gather_state = None
        x = state.x.view_as(state.x)
        _on_gradient(x, lambda: recording.begin(Phase.BACKWARD, place))
        if (place.block,) == self._last[place.stack]:
            following = "decoder" if place.stack == "encoder" else "head"
            recording.begin(Phase.FORWARD, ChainPlace(following))
        return replace(state, x=x)


def _on_gradient(x: Tensor, call: Any) -> None:
    if x.requires_grad:  # else nothing is trained that it depends on
        x.register_hook(lambda _: call())


def _first_stack(model: Transformer) -> str:
    return "encoder" if len(model.encoder) else "decoder"


def smallest_plan(plan: ParallelPlan, *, expert_counts: Sequence[int]) -> ParallelPlan:
    """Return the plan with the fewest data-parallel ranks whose axes have several where these do.

    With ZeRO an axis has eight ranks, or as many as here: shards of gradients, which there are
    beside the whole ones, are then small. One pipeline stage is enough: it stands for all.
    """
    stage = plan.replace(pipe=1)
    for data in range(1, stage.data or 1):
        smaller = stage.replace(data=data)
        if not list(smaller.problems()) and _same_axes(stage, smaller, expert_counts=expert_counts):
            return smaller
    return stage


def _same_axes(plan: ParallelPlan, other: ParallelPlan, *, expert_counts: Sequence[int]) -> bool:
    return all(
        other.axes(num_experts=number)[axis] >= min(size, 8 if plan.zero else 2)
        for number in (None, *expert_counts)
        for axis, size in plan.axes(num_experts=number).items()
    )
