"""Pipeline schedules: the order in which pipeline stages run forward and backward passes.

``torch.distributed.pipelining`` runs them; this file has the requirements of each.
"""

import functools
import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch.autograd.graph import GradientEdge

from moesaic.core.config import Choice
from moesaic.core.shapes import Tensor


class StagePass(NamedTuple):
    """A forward or backward pass of a micro-batch on one of a rank's stages, numbered from 0."""

    stage: int
    is_backward: bool


class PipelineSchedule(Choice):
    """Family: pipeline schedules.

    ``torch_name`` is the class in ``torch.distributed.pipelining``. ``v_shaped``: two stages per
    rank, assigned down the ranks and back up, so that the first rank has the last stage too.
    ``splits_backward``: gradients of weights are computed apart from those of inputs (zero bubble).
    ``fills_stages``: needs as many micro-batches as stages. ``equal_rounds``: needs micro-batches
    that divide into equal rounds of about one per rank. ``holds_sent``: PyTorch waits for all sends
    at the end of a step, so what was sent is held until then.
    """

    torch_name: ClassVar[str]
    v_shaped: ClassVar[bool] = False
    splits_backward: ClassVar[bool] = False
    fills_stages: ClassVar[bool] = False
    equal_rounds: ClassVar[bool] = False
    holds_sent: ClassVar[bool] = True
    idle_share: ClassVar[float] = 1.0

    def stages_per_rank(self) -> int:
        """Return how many stages each rank has."""
        return 2 if self.v_shaped else 1

    def rank_of_stage(self, ranks: int) -> tuple[int, ...]:
        """Return the pipeline rank of each stage."""
        if self.v_shaped:
            return (*range(ranks), *reversed(range(ranks)))
        return tuple(range(ranks)) * self.stages_per_rank()

    def passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        """Return a rank's passes in their order; a split backward pass stands at its end."""
        del ranks, rank
        return _rounds(self.stages_per_rank(), micro_batches, each=micro_batches)

    def whole_passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        """Return a rank's passes in their order if no backward pass is split."""
        return self.passes(ranks=ranks, rank=rank, micro_batches=micro_batches)

    def bubble(self, *, ranks: int, micro_batches: int, splits_backward: bool = True) -> float:
        """Return the share of a step in which a rank waits, if all stages take equally long.

        ``(p - 1) / (m v + p - 1)`` with v stages on each of p ranks (2104.04473, section 2.2), or
        less where the schedule may split backward passes.
        """
        waits = (self.idle_share if splits_backward else 1.0) * (ranks - 1)
        return waits / (micro_batches * self.stages_per_rank() + waits)

    def problems(self, *, ranks: int, micro_batches: int) -> str | None:
        """Return what the schedule expects if the number of micro-batches does not fit, or None."""
        stages, rounds = ranks * self.stages_per_rank(), max(1, micro_batches // ranks)
        if self.fills_stages and micro_batches < stages:
            return f"at least as many micro-batches as stages, {stages}, not {micro_batches}"
        if self.equal_rounds and micro_batches % rounds:
            return f"micro-batches that divide into {rounds} equal rounds, not {micro_batches}"
        return None


class GPipe(PipelineSchedule):
    """All forwards, then all backwards (1811.06965): activations of all micro-batches are kept."""

    torch_name = "ScheduleGPipe"


class OneForwardOneBackward(PipelineSchedule):
    """1F1B with flush: alternates forward and backward once the pipeline is full (2006.09503).

    The bubble is that of ``GPipe``; a stage keeps the activations of at most as many micro-batches
    as there are stages from it on.
    """

    torch_name = "Schedule1F1B"
    fills_stages = True
    holds_sent = False

    def passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        return _rounds(1, micro_batches, each=micro_batches, ahead=ranks - 1 - rank)


class Interleaved(PipelineSchedule):
    """Interleaved 1F1B: ``stages`` smaller (virtual) stages per rank (2104.04473)."""

    torch_name = "ScheduleInterleaved1F1B"
    equal_rounds = True
    stages: int = Field(default=2, ge=2)

    def stages_per_rank(self) -> int:
        return self.stages

    def passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        return _interleaved(self.stages, ranks, micro_batches, ahead=2 * (ranks - 1 - rank))


class BreadthFirst(PipelineSchedule):
    """All micro-batches through one of a rank's ``stages`` before the next (2211.05953)."""

    torch_name = "ScheduleLoopedBFS"
    stages: int = Field(default=2, ge=2)

    def stages_per_rank(self) -> int:
        return self.stages


class InterleavedZeroBubble(PipelineSchedule):
    """Interleaved 1F1B that computes gradients of weights in the bubble (2401.10241)."""

    torch_name = "ScheduleInterleavedZeroBubble"
    splits_backward = True
    equal_rounds = True
    idle_share = 1 / 3  # of forward, gradients of inputs and of weights, one is left
    stages: int = Field(default=2, ge=2)

    def stages_per_rank(self) -> int:
        return self.stages

    def passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        # a rank runs further ahead by one micro-batch for each rank behind it, and so do the
        # gradients of weights that wait
        return _interleaved(self.stages, ranks, micro_batches, ahead=2 * ranks - 1 - rank)

    def whole_passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        return _interleaved(self.stages, ranks, micro_batches, ahead=ranks - 1 - rank)


class ZeroBubbleV(PipelineSchedule):
    """ZBV: two stages per rank in a V, gradients of weights in the bubble (2401.10241, sec. 6)."""

    torch_name = "ScheduleZBVZeroBubble"
    v_shaped = True
    splits_backward = True
    idle_share = 0.0

    def passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        return _v_shaped(ranks, rank, micro_batches)

    def whole_passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        # planned for as many micro-batches as fill the V, of which there may be fewer
        full = max(2 * ranks - 1, micro_batches)
        first = [_F0] * (2 * (ranks - rank) - 1) + [_F1, _F0] * rank + [_F1, _B1] * (ranks - rank)
        more = full - (2 * (ranks - rank) - 1 + rank)
        steady = [_F0, _B0, _F1, _B1] * more + [_B0, _F1, _B1] * (full - more - ranks)
        last = [_B0, _B1] * rank + [_B0] * (ranks - rank)
        return _first_of_each(micro_batches, [*first, *steady, *last])


class DualPipeV(PipelineSchedule):
    """Two stages per rank in a V, forward and backward overlapped (after 2412.19437)."""

    torch_name = "ScheduleDualPipeV"
    v_shaped = True
    splits_backward = True
    fills_stages = True
    idle_share = 1 / 3

    def passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        return _v_shaped(ranks, rank, micro_batches)

    def whole_passes(self, *, ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
        behind = ranks - rank - 1
        first = [_F0] * (2 * behind) + [_F0, _F1] * (rank + 1) + [_B1, _F1] * behind
        steady = [_F0, _B1, _F1, _B0] * (micro_batches - ranks - behind)
        last = [_B1, _F1, _B0] * behind + [_B1, _B0] * (rank + 1) + [_B0] * behind
        return (*first, *steady, *last)


# forward and backward passes of the stage down the V, and of that up
_F0, _F1, _B0, _B1 = (StagePass(stage, back) for back in (False, True) for stage in (0, 1))


def _first_of_each(number: int, passes: Sequence[StagePass]) -> tuple[StagePass, ...]:
    """Return the first passes, so many of each."""
    counts: Counter[StagePass] = Counter()
    found = list[StagePass]()
    for each in passes:
        counts[each] += 1
        found += [each] * (counts[each] <= number)
    return tuple(found)


def _v_shaped(ranks: int, rank: int, micro_batches: int) -> tuple[StagePass, ...]:
    """Return passes that keep the micro-batches between a rank's stage down the V and that up."""
    down, up = min(micro_batches, 2 * ranks - rank), min(micro_batches, rank + 1)
    found = [StagePass(0, is_backward=False)] * down + [StagePass(1, is_backward=False)] * up
    for number in range(micro_batches):
        found += [StagePass(1, is_backward=True), StagePass(0, is_backward=True)]
        found += [StagePass(0, is_backward=False)] * (down + number < micro_batches)
        found += [StagePass(1, is_backward=False)] * (up + number < micro_batches)
    return tuple(found)


def _interleaved(
    stages: int, ranks: int, micro_batches: int, *, ahead: int
) -> tuple[StagePass, ...]:
    each = micro_batches // max(1, micro_batches // ranks)
    return _rounds(stages, micro_batches, each=each, ahead=(stages - 1) * each + ahead)


def _rounds(
    stages: int, micro_batches: int, *, each: int, ahead: int | None = None
) -> tuple[StagePass, ...]:
    """Return passes in rounds of ``each`` micro-batches on every stage.

    From ``ahead`` forward passes on, each next one is followed by a backward pass; None: the
    backward passes come after all others.
    """
    found, total = list[StagePass](), stages * micro_batches
    backward = [StagePass(stages - 1 - i // each % stages, is_backward=True) for i in range(total)]
    for number in range(total):
        found.append(StagePass(number // each % stages, is_backward=False))
        if ahead is not None and number >= ahead:
            found.append(backward[number - ahead])
    done = sum(each.is_backward for each in found)
    return (*found, *backward[done:])


def torch_pipelining() -> Any:
    """Return ``torch.distributed.pipelining``, imported only here.

    It imports torch's compiler and Triton, seconds that a run without a pipeline need not pay.
    """
    return importlib.import_module("torch.distributed.pipelining")


@functools.cache
def can_split_backward() -> bool:
    """Whether this PyTorch can start backward at a custom autograd Function: 2.13 can, 2.11 not."""
    x = torch.ones(1, requires_grad=True)
    edge = GradientEdge(_CustomIdentity.apply(x).grad_fn, 0)
    try:
        torch.autograd.grad([edge], [x], grad_outputs=[torch.ones(1)])
    except RuntimeError:
        return False
    return True


class _CustomIdentity(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]
