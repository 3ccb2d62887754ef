"""Schedules: in which order the stages of a pipeline take up micro-batches.

PyTorch runs them (``torch.distributed.pipelining``); here is what each needs, as arithmetic.
"""

import functools
import importlib
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.autograd.graph import GradientEdge

from moesaic.core.config import Choice
from moesaic.core.shapes import Tensor


class PipelineSchedule(Choice):
    """Family of schedules.

    ``torch_name`` is the class in ``torch.distributed.pipelining``; ``folded`` means that the chain
    of stages runs down the ranks and back up (a V), so that the first rank has the last stage too;
    ``splits`` that the gradients of weights are made apart from those of what came in.
    """

    torch_name: ClassVar[str]
    v_shaped: ClassVar[bool] = False
    splits_backward: ClassVar[bool] = False

    def stages_per_rank(self) -> int:
        """Return the stages that each rank has."""
        return 1

    def rank_of_stage(self, ranks: int) -> tuple[int, ...]:
        """Return which rank of the pipeline has each stage."""
        if self.v_shaped:
            return (*range(ranks), *reversed(range(ranks)))
        return tuple(range(ranks)) * self.stages_per_rank()

    def problems(self, *, ranks: int, micro_batches: int) -> str | None:
        """Return what it expects, if so many micro-batches on so many ranks are not it."""
        del ranks, micro_batches
        return None


class GPipe(PipelineSchedule):
    """All forwards, then all backwards (1811.06965): every micro-batch is kept until then."""

    torch_name = "ScheduleGPipe"


class OneForwardOneBackward(PipelineSchedule):
    """One forward, one backward in turn once the pipeline is full (2006.09503, 1F1B with flush).

    The bubble is that of ``GPipe``; a stage keeps at most as many micro-batches as stages follow.
    """

    torch_name = "Schedule1F1B"

    def problems(self, *, ranks: int, micro_batches: int) -> str | None:
        return _fewer_than(ranks, micro_batches, what="stages")


class Interleaved(PipelineSchedule):
    """1F1B with ``stages`` smaller stages per rank, earlier micro-batches first (2104.04473)."""

    torch_name = "ScheduleInterleaved1F1B"
    stages: int = Field(default=2, ge=2)

    def stages_per_rank(self) -> int:
        return self.stages

    def problems(self, *, ranks: int, micro_batches: int) -> str | None:
        return _uneven_rounds(ranks, micro_batches)


class BreadthFirst(PipelineSchedule):
    """All micro-batches through one of a rank's ``stages`` before the next (2211.05953)."""

    torch_name = "ScheduleLoopedBFS"
    stages: int = Field(default=2, ge=2)

    def stages_per_rank(self) -> int:
        return self.stages


class InterleavedZeroBubble(PipelineSchedule):
    """Interleaved 1F1B whose idle time makes gradients of weights (2401.10241)."""

    torch_name = "ScheduleInterleavedZeroBubble"
    splits_backward = True
    stages: int = Field(default=2, ge=2)

    def stages_per_rank(self) -> int:
        return self.stages

    def problems(self, *, ranks: int, micro_batches: int) -> str | None:
        return _uneven_rounds(ranks, micro_batches)


class ZeroBubbleV(PipelineSchedule):
    """Two stages per rank in a V, gradients of weights in the idle time (2401.10241, section 6)."""

    torch_name = "ScheduleZBVZeroBubble"
    v_shaped = True
    splits_backward = True

    def stages_per_rank(self) -> int:
        return 2


class DualPipeV(PipelineSchedule):
    """Two stages per rank in a V, a forward and a backward side by side (after 2412.19437)."""

    torch_name = "ScheduleDualPipeV"
    v_shaped = True
    splits_backward = True

    def stages_per_rank(self) -> int:
        return 2

    def problems(self, *, ranks: int, micro_batches: int) -> str | None:
        return _fewer_than(2 * ranks, micro_batches, what="stages")


def torch_pipelining(module: str = "") -> Any:
    """Return PyTorch's package of pipelines, or a module of it.

    Imported when it is asked for: it brings torch's compiler and Triton, seconds that a run
    without a pipeline need not pay.
    """
    return importlib.import_module(f"torch.distributed.pipelining{module}")


@functools.cache
def can_split_backward() -> bool:
    """Whether this PyTorch begins a backward at an operation of our own: 2.13 does, not 2.11."""
    x = torch.ones(1, requires_grad=True)
    edge = GradientEdge(_CustomIdentity.apply(x).grad_fn, 0)
    try:
        torch.autograd.grad([edge], [x], grad_outputs=[torch.ones(1)])
    except RuntimeError:
        return False
    return True


class _CustomIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return grads[0]


def _fewer_than(wanted: int, micro_batches: int, *, what: str) -> str | None:
    if micro_batches >= wanted:
        return None
    return f"at least as many micro-batches as {what}, {wanted}, not {micro_batches}"


def _uneven_rounds(ranks: int, micro_batches: int) -> str | None:
    rounds = max(1, micro_batches // ranks)
    if micro_batches % rounds == 0:
        return None
    return f"micro-batches that divide into {rounds} equal rounds, not {micro_batches}"
