"""Differences between two training traces of the same steps, and the tolerances for rounding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from moesaic.core.shapes import Tensor
from moesaic.optim.optimizer import Muon
from moesaic.train.run import Run
from moesaic.verify.record_run import NamedTensors, TrainingTrace


@dataclass(frozen=True, slots=True)
class Tolerances:
    """The greatest differences that float32 sums in another order explain.

    A sum of n numbers in another order differs by about ``sqrt(n) * 6e-8`` of their size. ``loss``
    (every metric of the trainer, relative), ``norm`` and ``gradient`` (relative to the tensor's
    greatest value) allow for a few thousand numbers and for the steps before. ``weight`` is
    relative to the step's greatest change of the tensor, about a hundredth of the weights: one
    rounding of a gain of 1 that changed by 0.01 is 6e-6 of the change. Muon amplifies the smallest
    directions of a matrix by up to ``3.44 ** 5 = 480``, rounding included, so its tolerance is ten
    times larger. A gradient averaged over two ranks instead of summed, or a loss counted twice,
    differs by 0.01 to 1.
    """

    loss: float = 2e-6
    norm: float = 2e-6
    gradient: float = 2e-5
    weight: float = 3e-4

    @staticmethod
    def for_run(run: Run) -> "Tolerances":
        """Return the tolerances for a run's optimizer."""
        default = Tolerances()
        is_muon = isinstance(run.optimizer, Muon)
        return replace(default, weight=10 * default.weight) if is_muon else default


@dataclass(frozen=True, slots=True)
class MaxDifference:
    """The greatest difference of one measure, and the name and step where it occurs."""

    value: float
    where: str


@dataclass(frozen=True, slots=True)
class TraceDifferences:
    """The differences of a trace from the reference, by the measures of ``Tolerances``.

    ``expert_counts`` is the number of experts of a layer with another number of tokens,
    ``replicas`` the greatest difference between replicas of a tensor. Both must be 0.
    """

    loss: MaxDifference
    metrics: MaxDifference
    norm: MaxDifference
    gradient: MaxDifference
    weight: MaxDifference
    expert_counts: MaxDifference
    replicas: MaxDifference

    def exceeding(self, tolerances: Tolerances) -> list[str]:
        """Return each measure beyond its tolerance, with its value and place; NaN is beyond any.

        The likeliest cause comes first.
        """
        limits = {
            "expert_counts": 0.0,
            "loss": tolerances.loss,
            "metrics": tolerances.loss,
            "norm": tolerances.norm,
            "gradient": tolerances.gradient,
            "weight": tolerances.weight,
            "replicas": 0.0,
        }
        measures = {name: (getattr(self, name), limit) for name, limit in limits.items()}
        return [
            f"{name} {difference.value:.1e} ({difference.where})"
            for name, (difference, limit) in measures.items()
            if not difference.value <= limit
        ]


def compare_traces(reference: TrainingTrace, *, other: TrainingTrace) -> TraceDifferences:
    """Measure how two traces of the same steps differ."""
    steps = len(reference.metrics)
    if len(other.metrics) != steps:
        raise ValueError(f"a trace of {len(other.metrics)} steps compared with one of {steps}")

    def metric(*prefixes: str) -> MaxDifference:
        pairs = zip(reference.metrics, other.metrics, strict=True)
        return _max_difference(_metric_differences(pairs, prefixes=prefixes))

    return TraceDifferences(
        loss=metric("train/loss"),
        metrics=metric("train/", "tokens"),
        norm=metric("train/grad_norm"),
        gradient=_max_over_steps(reference.gradients, other.gradients, _gradient_differences),
        weight=_max_difference(_weight_differences(reference.weights, other.weights)),
        expert_counts=_max_over_steps(
            reference.expert_counts, other.expert_counts, _expert_count_differences
        ),
        replicas=_max_difference((value, name) for value, name in other.replica_differences),
    )


_Differences = Iterator[tuple[float, str]]  # a difference, and where it is


def _metric_differences(
    steps: Iterator[tuple[Mapping[str, float], Mapping[str, float]]], *, prefixes: tuple[str, ...]
) -> _Differences:
    for step, (expected, actual) in enumerate(steps, start=1):
        for name, value in expected.items():
            if name.startswith(prefixes):
                error = abs(actual.get(name, torch.nan) - value) / max(abs(value), 1e-12)
                yield error if value or error else 0.0, f"{name}, step {step}"


def _max_over_steps(
    expected: Sequence[NamedTensors],
    actual: Sequence[NamedTensors],
    differences: Callable[[NamedTensors, NamedTensors], _Differences],
) -> MaxDifference:
    steps = enumerate(zip(expected, actual, strict=True), start=1)
    return _max_difference(
        (value, f"{name}, step {step}")
        for step, pair in steps
        for value, name in differences(*pair)
    )


def _gradient_differences(expected: NamedTensors, actual: NamedTensors) -> _Differences:
    # a gradient far smaller than the others is a difference of larger terms: mostly rounding
    floor = 1e-3 * max(_max_abs(grad) for grad in expected.values())
    for name, grad in expected.items():
        yield _max_abs(actual[name] - grad) / max(_max_abs(grad), floor, 1e-30), name


def _expert_count_differences(expected: NamedTensors, actual: NamedTensors) -> _Differences:
    for name, counts in expected.items():
        yield float((counts != actual[name]).sum()), name


def _weight_differences(
    expected: Sequence[NamedTensors], actual: Sequence[NamedTensors]
) -> _Differences:
    for name, weight in expected[0].items():
        error = _max_abs(actual[0][name] - weight) / max(_max_abs(weight), 1e-30)
        yield error, f"{name}, initial"
    steps = zip(pairwise(expected), actual[1:], strict=True)
    for step, ((before, after), other) in enumerate(steps, start=1):
        for name, weight in after.items():
            change = _max_abs(weight - before[name])
            yield _max_abs(other[name] - weight) / max(change, 1e-30), f"{name}, step {step}"


def _max_abs(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _max_difference(differences: _Differences) -> MaxDifference:
    """Return the greatest difference; NaN is greater than any number."""
    greatest = MaxDifference(0.0, "")
    for value, where in differences:
        if value != value:
            return MaxDifference(value, where)
        if value > greatest.value:
            greatest = MaxDifference(value, where)
    return greatest
