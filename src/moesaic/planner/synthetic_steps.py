"""Synthetic steps: small training steps that calibration runs, and what they cost.

A model whose tensors hold a few values shows what calls cost within a step; models of middle size
show what operations that wait for memory take in a step over their times alone, as operands that
another operation left in a cache, or did not, are in no loop of one operation. Products of these
sizes take what they take alone.
"""

from collections.abc import Callable, Sequence

import torch

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.gradient_clipping import scale_gradients, tensor_norms
from moesaic.planner.cost_entries import OperationCost
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import dummy_batch, with_round_robin_routing
from moesaic.planner.machine import PRODUCTS, Machine
from moesaic.planner.measured_rates import Measurement, Stopwatch
from moesaic.planner.operation_recorder import OperationKind
from moesaic.planner.step_cost import step_cost
from moesaic.planner.step_time import compute_seconds


def _decoder(
    dim: int, *, layers: int, experts: int, k: int, rows: int, target: int
) -> CostSettings:
    config = ModelConfig(
        vocab_size=4 * dim,
        dim=dim,
        encoder=Stack(layers=0),
        decoder=Stack(layers=layers, moe_every=1),
        attention=AttentionConfig(heads=max(2, dim // 32)),
        feed_forward=FeedForwardConfig(hidden=max(8, 2 * dim)),
        moe=MoE(experts=experts, select=TopK(k=k)),
    )
    sizes = BatchDims(rows=rows, source=0, target=target)
    return CostSettings(model=config, sizes=sizes, device="cpu")


TINY = _decoder(8, layers=4, experts=2, k=1, rows=1, target=8)
MIDDLE = (
    _decoder(64, layers=3, experts=4, k=1, rows=16, target=48),
    _decoder(128, layers=3, experts=6, k=2, rows=12, target=48),
    _decoder(256, layers=2, experts=6, k=1, rows=12, target=48),
)


def step_call(watch: Stopwatch) -> Measurement:
    """Time an operation of a step whose tensors are so small that only calls cost.

    Modules, dispatch, autograd and the optimizer's loop are in it. ``size`` are the bytes of a mean
    operation.
    """
    operations = _operations(TINY.replace(device=watch.device.type))
    calls = sum(each.count for each in operations)
    moved = sum(each.count * (each.bytes_read + each.bytes_written) for each in operations)
    call = _training_step(TINY, device=watch.device)
    found = watch.measure("call within a step", call, size=moved / calls)
    return Measurement(found.what, found.size, tuple(s / calls for s in found.seconds))


def synthetic_step(watch: Stopwatch, settings: CostSettings) -> Measurement:
    """Time a step of middle size: its update leaves other operands in the caches."""
    call = _training_step(settings, device=watch.device)
    return watch.measure(f"synthetic step, dim {settings.model.dim}", call, size=1)


def memory_over_parts(found: Sequence[Measurement], *, machine: Machine) -> float:
    """Return what memory-bound operations and attention take in the ``MIDDLE`` steps over alone.

    It is the factor with which the sums of operations' times fit the steps in least squares of
    their relative errors; products and the update have none.
    """
    shares: list[tuple[float, float]] = []
    for parts, each in zip(_parts(machine), found, strict=True):
        products = sum(parts.pop(kind, 0.0) for kind in (*PRODUCTS, "update"))
        shares.append((1 - products / each.median, sum(parts.values()) / each.median))
    return sum(rest * memory for rest, memory in shares) / sum(memory**2 for _, memory in shares)


def beside_memory_curve(slow_down: float, *, machine: Machine) -> float:
    """Return the part of the ``MIDDLE`` steps' slow-down that ``beside_busy_ranks`` has not."""
    alone, busy = (
        sum(
            each.compute_factor(OperationKind(kind), neighbours=False) * seconds
            for parts in _parts(each)
            for kind, seconds in parts.items()
            if kind != "update"
        )
        for each in (machine, machine.beside_busy_ranks())
    )
    return slow_down * alone / busy


def _parts(machine: Machine) -> list[dict[str, float]]:
    """Return the seconds of the ``MIDDLE`` steps by kind of operation, each timed alone."""
    found = []
    for settings in MIDDLE:
        moe = settings.model.moe
        experts = moe.experts if isinstance(moe, MoE) else 1
        operations = _operations(settings)
        found.append(compute_seconds(operations, machine=machine, local_experts=experts))
    return found


def training_passes(settings: CostSettings, *, device: torch.device) -> Callable[[], None]:
    """Return forward and backward of a step, with its routers' statistics, and clipping."""
    model, passes = _model_and_passes(settings, device=device)

    def call() -> None:
        passes()
        model.zero_grad()

    return call


def _training_step(settings: CostSettings, *, device: torch.device) -> Callable[[], None]:
    """Return ``training_passes`` and the update."""
    model, passes = _model_and_passes(settings, device=device)
    kinds = model.parameter_kinds()
    optimizer = settings.optimizer.build(model.named_parameters(), kinds=kinds)

    def call() -> None:
        passes()
        optimizer.step()
        optimizer.zero_grad()

    return call


def _model_and_passes(
    settings: CostSettings, *, device: torch.device
) -> tuple[Transformer, Callable[[], None]]:
    config = with_round_robin_routing(settings.model)
    with torch.device(device):
        model, batch = Transformer(config), dummy_batch(config, settings.sizes)

    def passes() -> None:
        output = model(batch)
        terms = [value for record in output.records for value in record.losses.values()]
        torch.stack([model.loss(output).total, *terms]).sum().backward()
        accumulate_routing_stats(model, output.records)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.stack(tensor_norms(gradients)).norm())
        scale_gradients(gradients, norm=norm, max_norm=norm / 2)

    return model, passes


def steps_in_turn(settings: Sequence[CostSettings]) -> Callable[[], None]:
    """Return the passes of several steps on the processor, one after the other."""
    calls = [training_passes(each, device=torch.device("cpu")) for each in settings]

    def call() -> None:
        for each in calls:
            each()

    return call


def _operations(settings: CostSettings) -> tuple[OperationCost, ...]:
    cost = step_cost(settings)
    return (*cost.operations, *cost.gradient_operations)
