"""Synthetic steps: small training steps that calibration runs, and what they cost.

A model whose tensors hold a few values shows what calls cost within a step; models of middle size
show what a step takes over the sum of its operations' times, as operands that another operation
left in a cache, or did not, are in no loop of one operation.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.planner.cost_entries import OperationCost, Phase
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import dummy_batch, with_round_robin_routing
from moesaic.planner.machine import Machine
from moesaic.planner.measured_rates import Measurement, Stopwatch
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
    _decoder(96, layers=3, experts=6, k=2, rows=20, target=48),
    _decoder(192, layers=2, experts=6, k=1, rows=28, target=48),
)


def step_call(watch: Stopwatch) -> Measurement:
    """Time an operation of a step whose tensors are so small that only calls cost.

    Modules, dispatch and autograd are in it. ``size`` are the bytes of a mean operation.
    """
    passes = _passes(TINY.replace(device=watch.device.type))
    calls = sum(each.count for each in passes)
    moved = sum(each.count * (each.bytes_read + each.bytes_written) for each in passes)
    call = training_passes(TINY, device=watch.device)
    found = watch.measure("call within a step", call, size=moved / calls)
    return Measurement(found.what, found.size, tuple(s / calls for s in found.seconds))


def synthetic_step(watch: Stopwatch, settings: CostSettings) -> Measurement:
    """Time a step of middle size."""
    call = training_passes(settings, device=watch.device)
    return watch.measure(f"synthetic step, dim {settings.model.dim}", call, size=1)


def over_parts(found: Sequence[Measurement], *, machine: Machine) -> list[Measurement]:
    """Return the times of the ``MIDDLE`` steps with the sum of their operations' as ``size``."""
    sized = []
    for settings, each in zip(MIDDLE, found, strict=True):
        moe = settings.model.moe
        experts = moe.experts if isinstance(moe, MoE) else 1
        parts = compute_seconds(_passes(settings), machine=machine, local_experts=experts)
        sized.append(replace(each, size=sum(parts.values())))
    return sized


def training_passes(settings: CostSettings, *, device: torch.device) -> Callable[[], None]:
    """Return forward and backward of a step, with the norms of its gradients."""
    config = with_round_robin_routing(settings.model)
    with torch.device(device):
        model, batch = Transformer(config), dummy_batch(config, settings.sizes)

    def call() -> None:
        output = model(batch)
        terms = [value for record in output.records for value in record.losses.values()]
        torch.stack([model.loss(output).total, *terms]).sum().backward()
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        model.zero_grad()

    return call


def steps_in_turn(settings: Sequence[CostSettings]) -> Callable[[], None]:
    """Return the passes of several steps on the processor, one after the other."""
    calls = [training_passes(each, device=torch.device("cpu")) for each in settings]

    def call() -> None:
        for each in calls:
            each()

    return call


def ratio(found: Sequence[Measurement]) -> float:
    """Return the mean of how much longer than its ``size`` in seconds each took."""
    return statistics.mean(each.median / each.size for each in found)


def _passes(settings: CostSettings) -> list[OperationCost]:
    cost = step_cost(settings)
    passes = [each for each in cost.operations if each.phase is not Phase.UPDATE]
    return [*passes, *cost.gradient_operations]
