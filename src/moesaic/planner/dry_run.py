"""Dry run: simulate one training step of one rank of many with fake tensors, in one process.

The step is the real one: ``parallelize_on_mesh`` shards the model, ZeRO partitions its state,
sequences are sharded, tokens are dispatched, gradients are summed and the optimizer updates. Only
tensors are fake (``distributed/simulation.py``), so a plan of 8,192 ranks runs on a laptop. Routing
is round-robin and ignores ``model.moe.select``: fake tensors have no values to route by.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Tensor
from moesaic.data.batch import SOURCE_LANGUAGE, TARGET_LANGUAGE, TASK, Batch, InputRows
from moesaic.distributed.communication_counter import CommunicationCounter, SentCall
from moesaic.distributed.mesh import DATA_CONTEXT_AXES, STAGE_AXES, Mesh
from moesaic.distributed.process_groups import Group
from moesaic.distributed.simulation import SharedChunks, SimulatedRank, fake_process_group
from moesaic.distributed.world import local_tensor
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, SparseLayer
from moesaic.moe.expert_selection import Select
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing
from moesaic.ops.chunk_sizes import use_chunk_sizes
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.sharding_plan import EXPERT_STAGE_AXES
from moesaic.planner.cost_settings import CostSettings

DUMMY_TOKEN = 7  # any token but padding


class SimulatedTopK(Select):
    """Round-robin routing: token t takes the k experts after those of token t - 1.

    With ``busiest_share``, so much of all edges goes to expert 0, one of a token at most, and the
    rest is round-robin over the others.
    """

    k: int = 1
    busiest_share: float | None = None

    def __call__(self, router: RouterContext) -> Routing:
        tokens, experts = router.logits.shape
        token = torch.arange(tokens, device=router.context.row.device)[:, None]
        place = self.k * token + torch.arange(self.k, device=token.device)
        if self.busiest_share is None or experts == 1:
            expert = place % experts
        else:
            expert = 1 + place % (experts - 1)
            expert[: round(self.busiest_share * tokens * self.k), 0] = 0
        weight = router.logits.softmax(-1).gather(-1, expert)
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """Bytes that one rank holds after a step, its peak before the update, and its communication.

    ``kept`` is what the forward pass leaves: activations saved for the backward
    pass and parameters gathered by ZeRO.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    peak: int
    sent: tuple[CommunicationVolume, ...]
    seconds: float


def with_round_robin_routing(
    config: ModelConfig, *, busiest_share: float | None = None
) -> ModelConfig:
    """Return a config with round-robin routing and the same number of experts per token."""

    def changed(sparse: SparseLayer) -> SparseLayer:
        if not isinstance(sparse, MoE):
            return sparse
        k = round(sparse.select.experts_per_token(sparse.num_router_outputs))
        return sparse.replace(select=SimulatedTopK(k=k, busiest_share=busiest_share))

    stacks = {
        side: stack if stack.moe is None else stack.replace(moe=changed(stack.moe))
        for side, stack in (("encoder", config.encoder), ("decoder", config.decoder))
    }
    return config.replace(moe=changed(config.moe), **stacks)


def simulate_step(settings: CostSettings, *, rank: int = 0) -> DryRunResult:
    """Run one step of one micro-batch of a whole model as one rank; needs no process group.

    Tiers of memory are not simulated. Raises ConfigError if the plan does not fit the number of
    ranks or the model.
    """
    config, precision, world = settings.model, settings.precision, settings.world
    parallel = settings.parallel.replace(memory=MemoryPlan())
    started = time.perf_counter()
    with (
        fake_process_group(world, rank=rank),
        SimulatedRank() as simulation,
        simulation.ledger.watch_resizes(),
        use_chunk_sizes(settings.chunks),
    ):
        model = Transformer.without_values(with_round_robin_routing(config))
        settings.trainable.attach(model)
        mesh = Mesh(
            parallel.plan.resolve(world),
            rank=rank,
            device=torch.device("cpu"),
            expert_counts=expert_counts(model),
        )
        with SharedChunks():
            parallel_model = parallelize_on_mesh(
                model, parallel=parallel, mesh=mesh, precision=precision
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(settings.trainable.includes(name))
        before = simulation.ledger.live_bytes
        simulation.ledger.reset_peak()
        with CommunicationCounter(axes=mesh_groups(mesh)) as counter:
            parallel_model.before_backward(last=True)
            batch = dummy_batch(config, settings.sizes)
            # as in train/step.py, the output and its losses are there until the end of backward
            with parallel_model.precision.autocast(batch.device):
                output = model(batch)
                loss = model.loss(output)
            saved = simulation.ledger.live_bytes - before
            terms = [value for record in output.records for value in record.losses.values()]
            torch.stack([loss.total, *terms]).sum().backward()
            parallel_model.sum_gradients()
        peak = simulation.ledger.peak_bytes
        kinds = model.parameter_kinds()
        built = settings.optimizer.build(
            model.named_parameters(), kinds=kinds, master_weights=precision.master_weights
        )
        built.step()
        slots = [t for s in built.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        parameters = [local_tensor(p) for p in model.parameters()]
        gradients = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
        return DryRunResult(
            weights=_bytes(parameters),
            gradients=_bytes(gradients),
            optimizer=_bytes(slots),
            kept=saved,
            peak=peak,
            sent=measured_volume(counter),
            seconds=time.perf_counter() - started,
        )


def mesh_groups(mesh: Mesh) -> dict[str, Group]:
    """Return the process groups of a mesh by the names of ``RankParameters.group_name``.

    Groups with the same ranks appear once, under the first name.
    """
    unique: dict[str, Group] = {}
    named: list[tuple[str, Group]] = [("stage", mesh.group(*STAGE_AXES))]
    for axes in (DATA_CONTEXT_AXES, ("data",), ("context",), ("tensor",)):
        named.append(("+".join(axes), mesh.group(*axes)))
    for number in mesh.expert_counts:
        named += [(axis, mesh.group(axis, num_experts=number)) for axis in EXPERT_STAGE_AXES]
    for name, group in named:
        if group is not None and all(group is not other for other in unique.values()):
            unique[name] = group
    return unique


def dummy_batch(config: ModelConfig, sizes: BatchDims) -> Batch:
    """Return a batch of full rows (no padding)."""
    target = torch.full((sizes.rows, sizes.target), DUMMY_TOKEN)
    source = torch.full((sizes.rows, sizes.source if config.encoder.layers else 0), DUMMY_TOKEN)
    zero = torch.zeros(sizes.rows, dtype=torch.long)
    return Batch(
        source=InputRows.full(source),
        target=InputRows.full(target),
        labels=target,
        groups=dict.fromkeys((TASK, SOURCE_LANGUAGE, TARGET_LANGUAGE), zero),
        key=zero,
    )


def measured_volume(counter: CommunicationCounter) -> tuple[CommunicationVolume, ...]:
    """Return the counted bytes by collective and axis, summed over receivers."""
    return volumes(counter.calls())


def volumes(calls: Counter[SentCall]) -> tuple[CommunicationVolume, ...]:
    """Return the bytes and the number of calls by collective and axis, sorted."""
    sums: Counter[tuple[str, str]] = Counter()
    messages: Counter[tuple[str, str]] = Counter()
    for call, number in calls.items():
        sums[call.kind, call.axis] += number * call.sent_bytes
        messages[call.kind, call.axis] += number * (call.sent_bytes > 0)
    return tuple(
        CommunicationVolume(*key, size, messages[key]) for key, size in sorted(sums.items()) if size
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
