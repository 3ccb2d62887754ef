"""Compare: by how much two traces of the same steps differ, and whether that is only rounding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from moesaic.core.shapes import Tensor
from moesaic.optim.optimizer import Muon
from moesaic.train.run import Run
from moesaic.verify.record_run import NamedTensors, TrainingTrace


@dataclass(frozen=True, slots=True)
class Tolerances:
    """How far float32 sums in another order may be apart.

    A sum of n numbers in another order differs by about ``sqrt(n) * 6e-8`` of their size. ``loss``
    (every figure of the trainer, relative), ``norm`` and ``gradient`` (relative to the tensor's
    greatest value) leave that room for a few thousand numbers, and for the steps before. ``weight``
    is relative to how far the step moved the tensor's weights, some hundredth of their size: one
    rounding of a gain of 1 that moved by 0.01 is 6e-6 of the movement. Muon lifts what is smallest
    in a matrix by up to ``3.44 ** 5 = 480``, rounding included, so it needs ten times the room. A
    gradient that is a mean of two ranks where a sum was meant, or a loss that counts twice, is
    wrong by 0.01 to 1 of these.
    """

    loss: float = 2e-6
    norm: float = 2e-6
    gradient: float = 2e-5
    weight: float = 3e-4

    @staticmethod
    def for_run(run: Run) -> "Tolerances":
        """Return those of a run's optimizer."""
        plain = Tolerances()
        muon = isinstance(run.optimizer, Muon)
        return replace(plain, weight=10 * plain.weight) if muon else plain


@dataclass(frozen=True, slots=True)
class MaxDifference:
    """The greatest difference of its kind, and where it is."""

    value: float
    where: str


@dataclass(frozen=True, slots=True)
class TraceDifferences:
    """Of a trace from the reference's: see ``Tolerances`` for the measures.

    ``edges`` counts expert and layer pairs that another number of tokens went to; ``copies`` is by
    how much copies of one value differ between ranks. Both must be 0.
    """

    loss: MaxDifference
    metrics: MaxDifference
    norm: MaxDifference
    gradient: MaxDifference
    weight: MaxDifference
    expert_counts: MaxDifference
    replicas: MaxDifference

    def exceeding(self, tolerances: Tolerances) -> list[str]:
        """Return a few words for each measure that is beyond its tolerance, the first cause first.

        NaN is beyond any.
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
        found = {name: (getattr(self, name), limit) for name, limit in limits.items()}
        return [
            f"{name} {worst.value:.1e} ({worst.where})"
            for name, (worst, limit) in found.items()
            if not worst.value <= limit
        ]


def compare_traces(reference: TrainingTrace, *, other: TrainingTrace) -> TraceDifferences:
    """Measure how two traces of the same steps differ."""
    steps = len(reference.metrics)
    if len(other.metrics) != steps:
        raise ValueError(f"a trace of {len(other.metrics)} steps beside one of {steps}")
    return TraceDifferences(
        loss=_max_difference(
            _metric_differences(reference.metrics, other.metrics, of=("train/loss",))
        ),
        metrics=_max_difference(
            _metric_differences(reference.metrics, other.metrics, of=TRAIN_METRICS)
        ),
        norm=_max_difference(
            _metric_differences(reference.metrics, other.metrics, of=("train/grad_norm",))
        ),
        gradient=_max_difference(_gradient_differences(reference.gradients, other.gradients)),
        weight=_max_difference(_weight_differences(reference.weights, other.weights)),
        expert_counts=_max_difference(
            _expert_count_differences(reference.expert_counts, other.expert_counts)
        ),
        replicas=_max_difference((value, name) for value, name in other.replica_differences),
    )


TRAIN_METRICS = ("train/", "tokens")


def _metric_differences(
    ours: Sequence[Mapping[str, float]],
    theirs: Sequence[Mapping[str, float]],
    *,
    of: tuple[str, ...],
) -> Iterator[tuple[float, str]]:
    for step, (here, there) in enumerate(zip(ours, theirs, strict=True), start=1):
        for name, value in here.items():
            if name.startswith(of):
                off = abs(there.get(name, torch.nan) - value) / max(abs(value), 1e-12)
                yield off if value or off else 0.0, f"{name}, step {step}"


def _gradient_differences(
    ours: Sequence[NamedTensors], theirs: Sequence[NamedTensors]
) -> Iterator[tuple[float, str]]:
    for step, (here, there) in enumerate(zip(ours, theirs, strict=True), start=1):
        # of a tensor that has next to no gradient, rounding of what it is a difference of is left
        floor = 1e-3 * max(_max_abs(grad) for grad in here.values())
        for name, grad in here.items():
            off = _max_abs(there[name] - grad) / max(_max_abs(grad), floor, 1e-30)
            yield off, f"{name}, step {step}"


def _weight_differences(
    ours: Sequence[NamedTensors], theirs: Sequence[NamedTensors]
) -> Iterator[tuple[float, str]]:
    for name, weight in ours[0].items():
        yield _max_abs(theirs[0][name] - weight) / max(_max_abs(weight), 1e-30), f"{name}, at first"
    for step, ((before, here), there) in enumerate(
        zip(pairwise(ours), theirs[1:], strict=True), start=1
    ):
        for name, weight in here.items():
            moved = _max_abs(weight - before[name])
            yield _max_abs(there[name] - weight) / max(moved, 1e-30), f"{name}, step {step}"


def _expert_count_differences(
    ours: Sequence[NamedTensors], theirs: Sequence[NamedTensors]
) -> Iterator[tuple[float, str]]:
    for step, (here, there) in enumerate(zip(ours, theirs, strict=True), start=1):
        for name, counts in here.items():
            yield float((counts != there[name]).sum()), f"{name}, step {step}"


def _max_abs(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _max_difference(found: Iterator[tuple[float, str]]) -> MaxDifference:
    """Return the greatest; NaN is greater than any number."""
    worst = MaxDifference(0.0, "")
    for value, where in found:
        if value != value:
            return MaxDifference(value, where)
        if value > worst.value:
            worst = MaxDifference(value, where)
    return worst
