"""Rehearse: one training step of one rank of many, without the others and without any numbers.

The step is the real one: ``parallelize`` cuts the model, ZeRO shares it out, tokens are dealt, rows travel,
gradients are summed, the optimizer updates. Only tensors are fake (``distributed/simulation.py``), so a plan of
8,192 ranks is tried on a laptop. Experts are chosen evenly, whatever rule the config names: what a
router would choose is a question of numbers.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.mesh import DATA_CONTEXT_AXES, STAGE_AXES, Mesh
from moesaic.distributed.process_groups import Group
from moesaic.distributed.simulation import SharedChunks, SimulatedRank, fake_process_group
from moesaic.distributed.world import local_tensor
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, SparseLayer
from moesaic.moe.router_context import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.sharding_plan import EXPERT_STAGE_AXES

DUMMY_TOKEN = 7  # any token but padding


class RoundRobin(Select):
    """Token t goes to the k experts that follow those of token t - 1: every load is the same."""

    k: int = 1

    def __call__(self, gate: RouterContext) -> Routing:
        tokens, experts = gate.logits.shape
        first = self.k * torch.arange(tokens, device=gate.context.row.device)[:, None]
        expert = (first + torch.arange(self.k, device=first.device)) % experts
        weight = gate.logits.softmax(-1).gather(-1, expert)
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(self.k, num_experts))


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """What a step took on one rank: bytes held after it, most in use before its update, and sent.

    ``kept`` is what the forward pass added: for the backward pass, and what ZeRO gathered.
    """

    weights: int
    gradients: int
    optimizer: int
    saved_activations: int
    peak: int
    sent: tuple[CommunicationVolume, ...]
    seconds: float


def with_round_robin_routing(config: ModelConfig) -> ModelConfig:
    """Return a config whose routers choose evenly, as many experts per token as before."""
    stacks = {
        side: stack if stack.moe is None else stack.replace(moe=_round_robin(stack.moe))
        for side, stack in (("encoder", config.encoder), ("decoder", config.decoder))
    }
    return config.replace(moe=_round_robin(config.moe), **stacks)


def simulate_step(
    config: ModelConfig,
    *,
    parallel: ParallelConfig,
    world_size: int,
    sizes: BatchDims,
    rank: int = 0,
    optimizer: Optimizer | None = None,
) -> DryRunResult:
    """Take one step of one micro-batch as one of ``world`` ranks; no process group may be there.

    Raises ConfigError where the plan fits neither the number of ranks nor the model.
    """
    started = time.perf_counter()
    with fake_process_group(world_size, rank=rank), SimulatedRank() as alike:
        model = Transformer(with_round_robin_routing(config))
        mesh = Mesh(
            parallel.plan.resolve(world_size),
            rank=rank,
            device=torch.device("cpu"),
            expert_counts=expert_counts(model),
        )
        with SharedChunks():
            spread = parallelize_on_mesh(model, parallel=parallel, mesh=mesh)
        before = alike.allocated_bytes()
        alike.peak_bytes = 0
        with CommunicationCounter(axes=mesh_groups(mesh)) as wire:
            loss = _loss(spread, batch=dummy_batch(config, sizes))
            kept = alike.allocated_bytes() - before
            spread.before_backward(last=True)
            loss.backward()
            spread.sum_gradients()
        peak = alike.peak_bytes
        made = (optimizer or AdamW()).build(model.named_parameters(), kinds=model.parameter_kinds())
        made.step()
        slots = [t for s in made.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        parameters = [local_tensor(p) for p in model.parameters()]
        gradients = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
        return DryRunResult(
            weights=_bytes(parameters),
            gradients=_bytes(gradients),
            optimizer=_bytes(slots),
            saved_activations=kept,
            peak=peak,
            sent=communication_volume(wire),
            seconds=time.perf_counter() - started,
        )


def mesh_groups(mesh: Mesh) -> dict[str, Group]:
    """Return the groups of a mesh by what ``RankParameters.named`` calls them.

    Of two names for the same ranks the first is taken.
    """
    found: dict[str, Group] = {}
    said: list[tuple[str, Group]] = [("stage", mesh.group(*STAGE_AXES))]
    for axes in (DATA_CONTEXT_AXES, ("data",), ("context",), ("tensor",)):
        said.append(("+".join(axes), mesh.group(*axes)))
    for number in mesh.expert_counts:
        said += [(axis, mesh.group(axis, num_experts=number)) for axis in EXPERT_STAGE_AXES]
    for name, group in said:
        if group is not None and all(group is not other for other in found.values()):
            found[name] = group
    return found


def dummy_batch(config: ModelConfig, sizes: BatchDims) -> Batch:
    """Return rows without padding."""
    target = torch.full((sizes.rows, sizes.target), DUMMY_TOKEN)
    source = torch.full((sizes.rows, sizes.source if config.encoder.layers else 0), DUMMY_TOKEN)
    zero = torch.zeros(sizes.rows, dtype=torch.long)
    return Batch(source, target, target, zero, zero, zero, zero)


def communication_volume(counter: CommunicationCounter) -> tuple[CommunicationVolume, ...]:
    """Return what a wire counted, all receivers together."""
    sums: Counter[tuple[str, str]] = Counter()
    for line in counter.entries():
        sums[line.kind, line.axis] += line.bytes
    return tuple(CommunicationVolume(*key, size) for key, size in sorted(sums.items()))


def _round_robin(sparse: SparseLayer) -> SparseLayer:
    if not isinstance(sparse, MoE):
        return sparse
    return sparse.replace(
        select=RoundRobin(k=round(sparse.select.experts_per_token(sparse.num_router_outputs)))
    )


def _loss(parallel_model: ParallelModel, *, batch: Batch) -> Tensor:
    output = parallel_model.model(batch)
    terms = [value for record in output.records for value in record.losses.values()]
    return torch.stack([parallel_model.model.loss(output).total, *terms]).sum()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
