"""Repeated results of fake tensors are those that PyTorch computes."""

from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moesaic.core.shapes import Tensor
from moesaic.distributed.fake_results import run_on_fake_tensors, tensors_in
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.parallel.config import ParallelConfig
from moesaic.planner import step_cost
from moesaic.planner.cost_settings import CostSettings
from moesaic.testing.tiny_models import tiny_model_config

aten = torch.ops.aten
MODE = FakeTensorMode(allow_non_fake_inputs=True)
with MODE:
    WIDE, ROW, NARROW = torch.empty(4, 6), torch.empty(6), torch.empty(4, 6, dtype=torch.bfloat16)
PLACES = torch.arange(8).view(4, 2) % 3
CALLS = (
    (aten.mm.default, (WIDE, WIDE.t()), {}),
    (aten.mm.default, (WIDE.t(), WIDE), {}),
    (aten.add.Tensor, (NARROW, WIDE), {}),
    (aten.add.Tensor, (NARROW, 2), {}),
    (aten.mul.Tensor, (WIDE, torch.tensor(2, dtype=torch.float64)), {}),
    (aten.add_.Tensor, (WIDE, ROW), {"alpha": 2}),
    (aten.mm.out, (WIDE, WIDE.t()), {"out": torch.empty(4, 4).fill_(0)}),
    (aten.gather.default, (WIDE, 1, PLACES), {}),
    (aten.index.Tensor, (WIDE, [PLACES]), {}),
    (aten.sum.dim_IntList, (WIDE, [1], True), {}),
    (aten.sum.dim_IntList, (WIDE, [1], False), {}),
    (aten.max.dim, (WIDE, 1), {}),
    (aten.split.Tensor, (WIDE, 3), {}),
    (aten.unbind.int, (WIDE,), {}),
    (aten.slice.Tensor, (WIDE, 1, 2, 4), {}),
    (aten.clone.default, (WIDE[:, 2:4],), {}),
    (aten.expand.default, (ROW, [4, 6]), {}),
    (aten._foreach_add_.Scalar, ([WIDE, ROW], 1), {}),
    (aten._foreach_mul.Scalar, ([WIDE, ROW], 2.0), {}),
    (aten.empty.memory_format, ([2, 3],), {"dtype": torch.float32}),
    (aten._to_copy.default, (WIDE,), {"dtype": torch.bfloat16}),
)


def described(out: object, given: list[Tensor]) -> list[object]:
    """What a result is: its memory, whose memory it shares, and whether it is an argument."""
    memory = [each.untyped_storage()._cdata for each in given]
    found = []
    for each in tensors_in((out,)):
        assert isinstance(each, FakeTensor)
        storage = each.untyped_storage()
        shared = storage._cdata in memory and memory.index(storage._cdata)
        place = next((i for i, one in enumerate(given) if one is each), None)
        layout = (each.shape, each.stride(), each.storage_offset(), storage.nbytes())
        found.append((layout, each.dtype, each.device, shared, place))
    return [type(out), *found]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call[0]))
def test_the_second_result_is_made_as_the_first_was_computed(call) -> None:
    func, args, kwargs = call
    kwargs = {
        name: MODE.from_tensor(value) if isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
    }
    given = tensors_in((*args, *kwargs.values()))
    with MODE:
        wanted = described(func(*args, **kwargs), given)
    for _ in range(2):
        assert described(run_on_fake_tensors(MODE, func, args, kwargs), given) == wanted


def test_a_step_costs_the_same_with_results_that_are_computed_each_time() -> None:
    settings = CostSettings(
        model=tiny_model_config(),
        parallel=ParallelConfig(plan=ParallelPlan(expert=2, zero=2)),
        sizes=BatchDims(rows=2, source=4, target=4),
        world=4,
    )
    found = step_cost.step_cost(settings)
    step_cost._measure_once.cache_clear()

    def compute(mode, func, args, kwargs):
        with mode:
            return func(*args, **kwargs)

    with patch("moesaic.distributed.simulation.run_on_fake_tensors", compute):
        assert step_cost.step_cost(settings) == found
    step_cost._measure_once.cache_clear()
