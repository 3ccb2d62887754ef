"""Differences of two traces: measures, tolerances, and NaN."""

import math
from dataclasses import replace

import pytest
import torch

from moesaic.verify.record_run import TrainingTrace
from moesaic.verify.trace_differences import Tolerances, compare_traces

LIMITS = Tolerances()


def trace() -> TrainingTrace:
    return TrainingTrace(
        metrics=[
            {"train/loss": 2.0, "train/loss_balance": 0.1, "train/grad_norm": 4.0, "tokens": 9}
        ],
        gradients=[{"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([1e-9])}],
        expert_counts=[{"encoder.1": torch.tensor([3, 4, 2])}],
        weights=[{"a": torch.tensor([5.0, 5.0])}, {"a": torch.tensor([5.1, 5.0])}],
        replica_differences=[(0.0, "a")],
    )


def wrong(other: TrainingTrace) -> str:
    return "; ".join(compare_traces(trace(), other=other).exceeding(LIMITS))


def test_a_trace_equals_itself() -> None:
    assert wrong(trace()) == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"metrics": [trace().metrics[0] | {"train/loss": 2.001}]},
            "loss 5.0e-04 (train/loss, step 1)",
        ),
        (
            {"metrics": [trace().metrics[0] | {"train/loss_balance": 0.2}]},
            "train/loss_balance, step 1",
        ),
        ({"metrics": [trace().metrics[0] | {"train/grad_norm": 4.01}]}, "norm 2.5e-03"),
        ({"metrics": [trace().metrics[0] | {"tokens": 10}]}, "tokens, step 1"),
        ({"metrics": [{"train/loss": 2.0}]}, "metrics nan"),
        ({"gradients": [{"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([0.0])}]}, "(a, step"),
        (
            {"expert_counts": [{"encoder.1": torch.tensor([4, 3, 2])}]},
            "expert_counts 2.0e+00 (encoder.1, step 1)",
        ),
        ({"weights": [trace().weights[0], trace().weights[0]]}, "weight 1.0e+00 (a, step 1)"),
        ({"weights": [trace().weights[1], trace().weights[1]]}, "(a, initial)"),
        ({"replica_differences": [(1e-7, "a")]}, "replicas 1.0e-07 (a)"),
    ],
)
def test_a_difference_has_its_name_and_step(changes: dict, problem: str) -> None:
    assert problem in wrong(replace(trace(), **changes))


def test_nan_equals_nothing() -> None:
    nan = torch.tensor([1.0, math.nan])
    other = replace(trace(), gradients=[{"a": nan, "b": torch.tensor([1e-9])}])
    assert "gradient nan (a, step 1)" in wrong(other)


def test_rounding_of_a_tiny_gradient_is_no_difference() -> None:
    other = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([-1e-9])}
    assert wrong(replace(trace(), gradients=[other])) == ""


def test_traces_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="0 steps compared with one of 1"):
        compare_traces(trace(), other=replace(trace(), metrics=[]))
