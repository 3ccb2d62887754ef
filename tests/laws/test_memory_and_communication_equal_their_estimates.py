"""Law: state and communication of a rank equal the cost of its step to the byte, the peak in 2 %.

On real ranks, and on one simulated rank of many.
"""

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as distributed

from moesaic.data.batch import Batch
from moesaic.distributed.communication_counter import CommunicationCounter
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.world import local_tensor
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.communication_volume import CommunicationVolume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.pipeline import LossSettings
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters
from moesaic.planner.cost_entries import DEVICE, Purpose
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import (
    dummy_batch,
    measured_volume,
    mesh_groups,
    simulate_step,
    with_round_robin_routing,
)
from moesaic.planner.step_cost import step_cost
from parallel.communication_cases import BIASED, BOTH, DECODER, SIZES, parallel

Lines = dict[tuple[str, str], int]
STATE = (Purpose.WEIGHTS, Purpose.GRADIENTS, Purpose.STATES)
ALL, LOW_RANK = AllParameters(), LoRA(rank=2)
REAL: dict[str, tuple[ModelConfig, ParallelConfig, TrainableParameters]] = {
    "E": (BOTH, parallel(expert=4), ALL),
    "E+D": (BIASED, parallel(expert=2), ALL),
    "E+Z": (DECODER, parallel(expert=2, zero=3), ALL),
    "E+Z+M": (BOTH, parallel(expert=2, tensor=2, zero=1), ALL),
    "E+M": (DECODER, parallel(expert=2, expert_tensor=2, tensor=2), ALL),
    "E+C": (BOTH, parallel(expert=4, context=2), ALL),
    "E+Z2": (BIASED, parallel(expert=2, zero=2, tensor=2), ALL),
    "P+Z": (DECODER, parallel(pipe=2, zero=1), ALL),
    "E+D, LoRA": (DECODER, parallel(expert=2), LOW_RANK),
    "E+Z+M, LoRA": (BOTH, parallel(expert=2, tensor=2, zero=1), LOW_RANK),
}
SIMULATED: dict[str, tuple[ModelConfig, ParallelConfig, int, int]] = {
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


def _sums(lines: Iterable[CommunicationVolume], groups: dict[str, str]) -> Lines:
    """Bytes by collective and group; axes with the same ranks are one group."""
    results: Counter[tuple[str, str]] = Counter()
    for line in lines:
        results[line.kind, groups.get(line.axis, line.axis)] += line.bytes
    return dict(results)


def _group_names(mesh: Mesh) -> dict[str, str]:
    """The name of the group of ranks of each axis."""
    named = {id(group): name for name, group in mesh_groups(mesh).items()}
    pairs = [(axis, mesh.group(axis)) for axis in ("data", "context", "tensor")]
    for number in mesh.expert_counts:
        axes = ("expert", "expert_data", "expert_tensor")
        pairs += [(axis, mesh.group(axis, num_experts=number)) for axis in axes]
    pairs.append(("data+context", mesh.group("data", "context")))
    return {axis: named[id(group)] for axis, group in pairs if group is not None}


def _step(names: Iterable[str]) -> dict[str, tuple[list[int], Lines, dict[str, str]]]:
    """Take a step of two micro-batches under each of these plans.

    Returns memory, communication and the names of groups.
    """
    rank, results = distributed.get_rank(), {}
    for name in names:
        config, parallel_config, trainable = REAL[name]
        model = Transformer(with_round_robin_routing(config))
        trainable.attach(model)
        plan = parallel_config.plan.resolve(4)
        mesh = Mesh(plan, rank=rank, device=torch.device("cpu"), expert_counts=expert_counts(model))
        parallel_model = parallelize_on_mesh(model, parallel=parallel_config, mesh=mesh)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.includes(path))
        with CommunicationCounter(axes=mesh_groups(mesh)) as counter:
            _forward_backward(parallel_model, [dummy_batch(config, SIZES) for _ in range(2)])
            parallel_model.sum_gradients()
        optimizer = AdamW().build(model.named_parameters(), kinds=model.parameter_kinds())
        optimizer.step()
        state_tensors = [t for state in optimizer.state.values() for t in state.values()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        memory = [_bytes(group) for group in (list(model.parameters()), grads, state_tensors)]
        groups = _group_names(mesh)
        results[name] = (memory, _sums(measured_volume(counter), groups), groups)
    return results


def _forward_backward(parallel_model: ParallelModel, batches: list[Batch]) -> None:
    model, pipeline = parallel_model.model, parallel_model.pipeline
    if pipeline is not None:
        parallel_model.before_backward(last=False)
        pipeline.forward_backward(batches, loss_settings=LossSettings(1))
        return
    for number, batch in enumerate(batches, 1):
        parallel_model.before_backward(last=number == len(batches))
        output = model(batch)
        terms = [value for record in output.records for value in record.losses.values()]
        torch.stack([model.loss(output).total, *terms]).sum().backward()


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local_tensor(t).numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("pipelined", [False, True])  # stages make groups of their own
def test_memory_and_communication_of_real_ranks_equal_their_estimates(pipelined: bool) -> None:
    names = [name for name in REAL if name.startswith("P") == pipelined]
    for rank, results in enumerate(run_on_ranks(4, _step, names)):
        for name, (memory, lines, groups) in results.items():
            config, parallel_config, trainable = REAL[name]
            case = CostSettings(
                model=config,
                parallel=parallel_config,
                world=4,
                sizes=SIZES,
                micro_batches=2,
                trainable=trainable,
            )
            cost = step_cost(case, rank=rank)
            state = [cost.held_bytes(purpose=purpose) for purpose in STATE]
            assert memory == state, f"rank {rank} of {name}"
            expected = _sums(cost.sent, groups)
            if pipelined:  # between stages: by the schedule, in groups that the mesh does not name
                lines, expected = _without_sends(lines), _without_sends(expected)
            assert lines == expected, f"rank {rank} of {name}"


def _without_sends(lines: Lines) -> Lines:
    return {key: size for key, size in lines.items() if key[0] != "send"}


@pytest.mark.parametrize("name", SIMULATED)
def test_memory_and_communication_of_a_simulated_rank_equal_their_estimates(name: str) -> None:
    config, parallel_config, world, rank = SIMULATED[name]
    case = CostSettings(model=config, parallel=parallel_config, world=world, sizes=SIZES)
    simulated, cost = simulate_step(case, rank=rank), step_cost(case, rank=rank)
    state = [simulated.weights, simulated.gradients, simulated.optimizer]
    assert state == [cost.held_bytes(purpose=purpose) for purpose in STATE]
    kinds = {line.kind for line in (*simulated.sent, *cost.sent)}
    for kind in kinds:
        expected = sum(line.bytes for line in cost.sent if line.kind == kind)
        assert sum(line.bytes for line in simulated.sent if line.kind == kind) == expected, kind
    peak = simulated.peak + simulated.optimizer
    if not parallel_config.plan.zero:  # FSDP2 frees what it was made of at first use
        assert cost.peak[DEVICE] == pytest.approx(peak, rel=0.02)
