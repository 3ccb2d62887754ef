"""Law: a rank holds and sends, to the byte, what closed forms say of its plan.

On real ranks, and on one rank of many rehearsed with fake tensors. What autograd keeps is within
10 % where nothing is gathered.
"""

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.world import local_tensor
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.moe_kernel import UnfusedMoEKernel
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.communication_volume import CommunicationVolume, communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.memory_estimate import estimate_memory
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.train.dry_run import (
    dummy_batch,
    measured_volume,
    mesh_groups,
    simulate_step,
    with_round_robin_routing,
)
from parallel.communication_cases import BIASED, BOTH, DECODER, SIZES, parallel

Lines = dict[tuple[str, str], int]
REAL: dict[str, tuple[ModelConfig, ParallelConfig]] = {
    "E": (BOTH, parallel(expert=4)),
    "E+D": (BIASED, parallel(expert=2)),
    "E+Z": (DECODER, parallel(expert=2, zero=3)),
    "E+Z+M": (BOTH, parallel(expert=2, tensor=2, zero=1)),
    "E+M": (DECODER, parallel(expert=2, expert_tensor=2, tensor=2)),
    "E+C": (BOTH, parallel(expert=4, context=2)),
    "E+Z2": (BIASED, parallel(expert=2, zero=2, tensor=2)),
}
REHEARSED: dict[str, tuple[ModelConfig, ParallelConfig, int, int]] = {
    "E+D of 64": (BIASED, parallel(expert=4), 64, 63),
    "E+Z of 48": (BOTH, parallel(expert=4, zero=3), 48, 2),
    "E+Z+M+C of 64": (
        BOTH,
        parallel(expert=4, tensor=2, context=2, expert_tensor=2, zero=2),
        64,
        5,
    ),
    "E+D+M of 1,024": (DECODER, parallel(expert=8, tensor=2), 1024, 0),
}


def _sums(lines: Iterable[CommunicationVolume], same: dict[str, str]) -> Lines:
    """Bytes by collective and group: two axes of the same ranks are one."""
    found: Counter[tuple[str, str]] = Counter()
    for line in lines:
        found[line.kind, same.get(line.axis, line.axis)] += line.bytes
    return dict(found)


def _same(mesh: Mesh) -> dict[str, str]:
    """The first name of the ranks that an axis stands for."""
    named = {id(group): name for name, group in mesh_groups(mesh).items()}
    pairs = [(axis, mesh.group(axis)) for axis in ("data", "context", "tensor")]
    for number in mesh.expert_counts:
        axes = ("expert", "expert_data", "expert_tensor")
        pairs += [(axis, mesh.group(axis, num_experts=number)) for axis in axes]
    pairs.append(("data+context", mesh.group("data", "context")))
    return {axis: named[id(group)] for axis, group in pairs if group is not None}


def _step() -> dict[str, tuple[list[int], Lines, list[int], Lines]]:
    """Take a step under every plan; return what was held and sent, and what was forecast."""
    rank, found = distributed.get_rank(), {}
    for name, (config, laid) in REAL.items():
        model = Transformer(with_round_robin_routing(config))
        plan = laid.plan.resolve(4)
        mesh = Mesh(plan, rank=rank, device=torch.device("cpu"), expert_counts=expert_counts(model))
        spread = parallelize_on_mesh(model, parallel=laid, mesh=mesh)
        with CommunicationCounter(axes=mesh_groups(mesh)) as wire:
            output = model(dummy_batch(config, SIZES))
            terms = [value for record in output.records for value in record.losses.values()]
            torch.stack([model.loss(output).total, *terms]).sum().backward()
            spread.sum_gradients()
        optimizer = AdamW().build(model.named_parameters(), kinds=model.parameter_kinds())
        optimizer.step()
        slots = [t for state in optimizer.state.values() for t in state.values()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        held = [_bytes(group) for group in (list(model.parameters()), grads, slots)]
        holding = ParameterInventory(config).on_rank(laid, world=4, rank=rank)
        said = estimate_memory(holding, sizes=SIZES)
        forecast = [said.weights, said.gradients, said.optimizer]
        same = _same(mesh)
        lines = _sums(communication_volume(holding, sizes=SIZES), same)
        found[name] = (held, _sums(measured_volume(wire), same), forecast, lines)
    return found


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local_tensor(t).numel() * t.element_size() for t in tensors)


def test_real_ranks_hold_and_send_what_is_forecast() -> None:
    for rank, found in enumerate(run_on_ranks(4, _step)):
        for name, (held, lines, forecast, said) in found.items():
            assert held == forecast, f"rank {rank} of {name}"
            assert lines == said, f"rank {rank} of {name}"


@pytest.mark.parametrize("name", REHEARSED)
def test_a_rehearsed_rank_holds_and_sends_what_is_forecast(name: str) -> None:
    config, laid, world, rank = REHEARSED[name]
    done = simulate_step(config, parallel=laid, world_size=world, sizes=SIZES, rank=rank)
    holding = ParameterInventory(with_round_robin_routing(config)).on_rank(
        laid, world=world, rank=rank
    )
    said = estimate_memory(holding, sizes=SIZES, kernel=UnfusedMoEKernel(SequentialGEMM()))
    assert [done.weights, done.gradients] == [said.weights, said.gradients]
    assert done.optimizer == said.optimizer
    kinds = {line.kind for line in done.sent}
    lines = communication_volume(holding, sizes=SIZES)
    for kind in kinds | {line.kind for line in lines}:
        wanted = sum(line.bytes for line in lines if line.kind == kind)
        assert sum(line.bytes for line in done.sent if line.kind == kind) == wanted, kind
    if not laid.plan.zero:
        assert said.activations == pytest.approx(done.saved_activations, rel=0.1)
