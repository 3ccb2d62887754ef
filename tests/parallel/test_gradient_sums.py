"""Gradients are summed while backward runs, in the same buckets as after it."""

from unittest.mock import patch

import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.parallel import gradient_sums
from moesaic.parallel.gradient_sums import GradientSums
from moesaic.testing.tiny_models import tiny_run, tiny_trainer

MICRO_BATCHES = 2


def _step(*, overlapped: bool) -> tuple[list[int], list[Tensor]]:
    """Return the micro-batches done before each bucket was started, and all gradients."""
    done, before = 0, []

    def count_backward(_: Tensor) -> None:
        nonlocal done
        done += 1

    start = GradientSums._start

    def start_counted(self: GradientSums, *arguments: object) -> None:
        before.append(done)
        start(self, *arguments)  # pyright: ignore[reportArgumentType]

    torch.manual_seed(0)
    with (
        patch.object(gradient_sums, "BUCKET_BYTES", 4000),
        patch.object(GradientSums, "_start", start_counted),
        patch.object(GradientSums, "before_last_backward", GradientSums.before_last_backward)
        if overlapped
        else patch.object(GradientSums, "before_last_backward"),
    ):
        trainer = tiny_trainer(
            tiny_run(gradient_accumulation_steps=MICRO_BATCHES), world=ProcessGroupWorld()
        )
        # the table of the embedding has its gradient last
        first = next(trainer.model.parameters())
        first.register_post_accumulate_grad_hook(count_backward)
        batches = [next(trainer.data) for _ in range(MICRO_BATCHES)]
        trainer.objective.forward_backward(trainer.parallel_model, batches=batches)
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    return before, grads


def _both() -> tuple[list[int], list[int], bool]:
    early, grads = _step(overlapped=True)
    late, others = _step(overlapped=False)
    same = all(map(torch.equal, grads, others))
    return early, late, same


def test_sums_start_in_the_last_backward_pass_and_have_the_same_bits() -> None:
    for early, late, same in run_on_ranks(2, _both):
        assert set(late) == {MICRO_BATCHES}
        assert len(early) == len(late)
        assert early[0] == MICRO_BATCHES - 1
        assert same
