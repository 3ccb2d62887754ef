"""Law: from the same gradients, 8-bit states and weights are those of one process, bit for bit.

Under ZeRO, expert, tensor and pipeline parallelism, resumed under another plan after half of the
steps; and a rank's states are the bytes of the forecast. (Losses of plans are not compared: their
gradients are sums in another order.)
"""

from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.full_checkpoint import load_checkpoint
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.core.shapes import Tensor
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World, local_tensor
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.optim.optimizer import AdamW, EightBitStates, Float32States, Optimizer, OptimizerStates
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.sharding_plan import slice_local
from moesaic.parallel.state_blocks import check_state_blocks
from moesaic.parallel.trainable_parameters import AllParameters
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.step_memory import state_bytes
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.trainer import Trainer
from moesaic.train.training_hooks import CheckpointHook

HALF = 2  # moments of two steps are saved, and what they give is used in a second one
MODEL = tiny_model_config()  # rows of 16 and 32 values, and of 64 that are gate and value
OPTIMIZER = AdamW(lr=1e-2, states=EightBitStates(block=8))
PLANS = {
    "one process": (1, {}),
    "ZeRO 1": (2, {"zero": 1}),
    "ZeRO 2, experts": (2, {"zero": 2, "expert": 2}),
    "ZeRO 3": (2, {"zero": 3}),
    "tensor, experts": (2, {"tensor": 2, "expert": 2}),
    "sliced experts, ZeRO": (4, {"expert_tensor": 2, "zero": 2}),
    "pipeline": (2, {"pipe": 2}),
}


def _trainer(plan: dict[str, int], optimizer: Optimizer = OPTIMIZER) -> Trainer:
    world: World = ProcessGroupWorld() if torch.distributed.is_initialized() else SingleProcess()
    parallel = ParallelConfig(plan=ParallelPlan(**plan))
    accumulation = 2 * parallel.plan.pipe
    run = tiny_run(model=MODEL, optimizer=optimizer, parallel=parallel)
    return tiny_trainer(run.replace(gradient_accumulation_steps=accumulation), world=world)


def _update(trainer: Trainer) -> None:
    """Take a step by gradients that depend on its number alone; of some experts they are zero."""
    model = trainer.parallel_model
    for number, (name, placement) in enumerate(sorted(model.sharding_plan.items())):
        make = torch.Generator().manual_seed(1000 * trainer.step + number)
        whole = torch.randn(placement.shape, generator=make) ** 5
        if placement.num_experts:
            whole[trainer.step % placement.num_experts] = 0
        parameter = dict(trainer.model.named_parameters()).get(name)
        if parameter is not None:
            parameter.grad = torch.zeros_like(parameter)
            local_tensor(parameter.grad).copy_(slice_local(whole, model.local_spans(name)))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.step += 1


def _run(plan: dict[str, int], folder: Path, start: Path | None, stop: int) -> tuple[int, int]:
    """Train to a checkpoint; return the bytes of this rank's states, and those of the forecast."""
    trainer = _trainer(plan)
    if start is not None:
        trainer.load_checkpoint(start)
    hook = CheckpointHook(folder, flush=lambda: None)
    hook.before_run(trainer)
    while trainer.step < stop:
        _update(trainer)
    hook.after_run(trainer)
    held = (t.nbytes for s in trainer.optimizer.state.values() for t in s.values())
    settings = CostSettings(model=MODEL, optimizer=OPTIMIZER, sizes=BatchDims(1, 4, 4))
    world = trainer.world
    parameters = ParameterInventory(MODEL).on_rank(
        trainer.run.parallel, world=world.size, rank=world.rank
    )
    return sum(held), state_bytes(parameters, settings).states


def _tensors(folder: Path, step: int) -> dict[str, Tensor]:
    files = load_checkpoint(folder / f"step-{step:08d}").files
    return {**files["model"], **files["optimizer"]}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for stop in (HALF, 2 * HALF):
        _run({}, folder, None, stop)
    return folder


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("ZeRO 1", "ZeRO 2, experts"),
        ("ZeRO 3", "tensor, experts"),
        ("sliced experts, ZeRO", "one process"),
        ("tensor, experts", "pipeline"),
    ],
)
def test_eight_bit_states_do_not_depend_on_the_plan(
    first: str, then: str, one_process: Path, tmp_path: Path
) -> None:
    start = None
    for stop, (ranks, plan) in ((HALF, PLANS[first]), (2 * HALF, PLANS[then])):
        for held, forecast in run_on_ranks(ranks, _run, plan, tmp_path, start, stop):
            assert held == forecast
        start = tmp_path / f"step-{stop:08d}"
        found, expected = _tensors(tmp_path, stop), _tensors(one_process, stop)
        assert found.keys() == expected.keys()
        assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
        assert found["exp_avg/encoder.0.feed_forward.inner.experts.up"].dtype == torch.uint8


@pytest.mark.parametrize(("block", "common"), [(12, 8), (64, 8)])
def test_a_plan_that_cuts_a_row_within_a_block_is_refused(block: int, common: int) -> None:
    model = Transformer.without_values(MODEL)
    optimizer = AdamW(states=EightBitStates(block=block))
    message = rf"block={block}\) with parallel.plan.tensor=2.*multiples of {common}.*divisor of"
    with pytest.raises(ConfigError, match=message):
        check_state_blocks(
            model,
            optimizer=optimizer,
            trainable=AllParameters(),
            plan=ParallelPlan(data=1, tensor=2),
        )


@pytest.mark.parametrize(
    ("before", "states", "what"),
    [
        (
            8,
            Float32States(),
            r"uint8 .* in it, expected torch.float32.*set optimizer.states .*to E",
        ),
        (
            8,
            EightBitStates(block=16),
            r"\[32, 2\] in it, .* \[32, 1\].*set optimizer.states .*block",
        ),
        (0, EightBitStates(), r"float32 .* in it, expected torch.uint8.*set .*to Float32States"),
    ],
)
def test_states_of_another_form_are_refused_with_the_way_out(
    before: int, states: OptimizerStates, what: str, one_process: Path, tmp_path: Path
) -> None:
    saved, trainer = one_process / f"step-{HALF:08d}", _trainer({}, AdamW(states=states))
    if not before:
        other = _trainer({}, AdamW())
        _update(other)
        CheckpointHook(tmp_path, flush=lambda: None).after_run(other)
        saved = tmp_path / f"step-{1:08d}"
    with pytest.raises(CheckpointError, match=what):
        trainer.load_checkpoint(saved)
