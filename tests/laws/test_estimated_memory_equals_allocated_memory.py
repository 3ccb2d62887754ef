"""Law: the forecast peak of a step equals the most bytes that a real step allocates at once.

The cases are those of ``benchmarks/peak_forecast.py`` that need one process, and a mixer that
declares nothing of what it keeps.
"""

import pytest
import torch
from peak_forecast import CASES, MODEL, PAIRS, forecast, measured_peak, settings
from torch import nn

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets import PRESETS, preset
from moesaic.model.transformer import Transformer
from moesaic.nn.parameter_spec import linear_specs
from moesaic.nn.sequence_mixer import SequenceMixer, SequenceMixerModule
from moesaic.parallel.activation_offload import offload_activations
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.planner.cost_entries import DEVICE, HOST, Purpose
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import dummy_batch, with_round_robin_routing
from moesaic.planner.step_cost import step_cost
from moesaic.planner.step_memory import state_bytes


class Squares(SequenceMixer):
    """A mixer of a user: it keeps more than its input, and says so nowhere."""

    def build(self, shape, /):
        return SquaresModule(shape.dim)

    def parameter_specs(self, shape, /):
        return linear_specs(shape.dim, shape.dim, bias=False)


class SquaresModule(SequenceMixerModule):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, **_):
        return self.out(x.square().exp().sin())


OWN = MODEL.replace(mixers={"squares": Squares()}, encoder=Stack(layers=3, pattern="squares"))
ONE_PROCESS = (
    "dense",
    "MoE, biases",
    "MoE, 3 micro-batches",
    "MoE, LoRA",
    "MoE, every second recomputed",
)


@pytest.mark.parametrize("name", list(PRESETS))
def test_forecast_weights_equal_allocated_weights(name: str) -> None:
    config: ModelConfig = preset(name).config
    with torch.device("meta"):
        model = Transformer(config)
    allocated = sum(p.numel() * p.element_size() for p in model.parameters())
    case = CostSettings(model=config, sizes=PAIRS)
    parameters = ParameterInventory(config).on_rank(case.parallel, world=1)
    assert state_bytes(parameters, case).weights == allocated


@pytest.mark.parametrize("name", [*ONE_PROCESS, "own mixer"])
def test_the_forecast_peak_equals_the_measured_peak(name: str) -> None:
    case = settings(OWN, PAIRS) if name == "own mixer" else CASES[name]
    assert forecast(case) == pytest.approx(measured_peak(case).tensors, rel=0.01)


@pytest.mark.parametrize("name", ["MoE", "MoE, every second recomputed"])
def test_forecast_bytes_of_offloaded_activations_equal_those_moved_and_held(name: str) -> None:
    away = CASES[name].parallel.replace(memory=MemoryPlan(activations=HostMemory()))
    case = CASES[name].replace(parallel=away, micro_batches=2)
    with torch.device("cpu"):
        model = Transformer(with_round_robin_routing(case.model))
    away.activation_checkpointing.apply(model)
    store = HostMemory().open(device=torch.device("cpu"), label="activations")
    offload_activations(model, store=store)
    for _ in range(case.micro_batches):
        model.loss(model(dummy_batch(case.model, case.sizes))).total.backward()
    cost = step_cost(case)
    moved = {m.source: m.bytes for m in cost.moved if m.purpose is Purpose.ACTIVATIONS}
    assert moved[DEVICE] == store.moved.written
    assert 0.99 * moved[HOST] < store.moved.fetched <= moved[HOST]  # a little is never used
    assert cost.held_bytes(tier=HOST, purpose=Purpose.ACTIVATIONS) == store.num_bytes
    assert cost.peak[HOST] == store.num_bytes
