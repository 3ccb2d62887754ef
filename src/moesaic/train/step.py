"""Training step: forward and backward of all micro-batches, gradients summed over ranks.

The loss is that of the head summed over all predictions of the step, divided by their number over
all micro-batches and ranks, plus each layer's auxiliary losses as the mean over micro-batches.
So the weight of a token depends neither on the number of ranks nor on that of micro-batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.flight_recorder import mark_phase
from moesaic.distributed.world import local_tensor
from moesaic.model.head import Head
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.moe.routing_record import RoutingRecord, loss_terms
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.pipeline import LossSettings, MicroBatch, Pipeline
from moesaic.parallel.precision import Precision
from moesaic.train.running_metrics import LossCategories, StepSums


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """Sums over micro-batches on this rank, and the last one with its detached routing records.

    The records of the others are gone when their backward pass is over.
    """

    sums: StepSums
    records: tuple[RoutingRecord, ...]
    batch: Batch


@dataclass(frozen=True, slots=True)
class Objective:
    """Training objective: the loss of the head plus the auxiliary losses of layers."""

    categories: LossCategories
    precision: Precision

    def forward_backward(
        self, parallel_model: ParallelModel, *, batches: Sequence[Batch]
    ) -> ForwardBackwardResult:
        """Compute the gradients of the step's loss, summed over ranks. Collective."""
        head = parallel_model.model.config.head
        world = parallel_model.data_world
        # filled on the device, and left there: the host waits for neither a copy nor the sum
        here = torch.full((), sum(map(head.num_predicted, batches)), device=world.device)
        predicted = world.all_reduce(here).clamp(min=1)
        if parallel_model.pipeline is not None:
            results = self._pipeline_forward_backward(parallel_model, batches, predicted=predicted)
        else:
            results = self._forward_backward_in_turn(parallel_model, batches, predicted=predicted)
        result = _merge_results(results)
        mark_phase("sum of gradients")
        parallel_model.sum_gradients()
        return result

    def _forward_backward_in_turn(
        self, parallel_model: ParallelModel, batches: Sequence[Batch], *, predicted: Tensor
    ) -> Iterator[ForwardBackwardResult]:
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            parallel_model.before_backward(last=last)
            result = self._micro_batch_forward_backward(
                parallel_model, batch, predicted=predicted, micro_batches=len(batches)
            )
            yield result if last else replace(result, records=())

    @torch.no_grad()
    def losses(self, parallel_model: ParallelModel, *, batch: Batch) -> Float[Tensor, "K+1 C"]:
        """Return summed losses, metrics and counts of predictions by category.

        They cover the predictions that this rank scores. Collective.
        """
        if parallel_model.pipeline is not None:
            settings = self._loss_settings(parallel_model.pipeline, predicted=1)
            (micro,) = parallel_model.pipeline.forward_only([batch], loss_settings=settings)
            return self._loss_sums(micro, head=parallel_model.model.config.head)
        model = parallel_model.model
        batch = batch.to(next(model.parameters()).device)
        with self.precision.autocast(batch.device):
            output = model(batch)
            loss = model.loss(output)
        return self.categories.sums(loss.values, row=output.row, batch=batch)

    def _pipeline_forward_backward(
        self, parallel_model: ParallelModel, batches: Sequence[Batch], *, predicted: Tensor
    ) -> list[ForwardBackwardResult]:
        pipeline, head = parallel_model.pipeline, parallel_model.model.config.head
        assert pipeline is not None
        tokens = [batch.num_tokens if parallel_model.counts_tokens else 0 for batch in batches]
        parallel_model.before_backward(last=False)
        micros = pipeline.forward_backward(
            batches, loss_settings=self._loss_settings(pipeline, predicted=predicted)
        )
        return [
            ForwardBackwardResult(
                StepSums(self._loss_sums(micro, head=head), micro.terms, count),
                micro.records,
                micro.batch,
            )
            for micro, count in zip(micros, tokens, strict=True)
        ]

    def _loss_settings(self, pipeline: Pipeline, *, predicted: Tensor | int) -> LossSettings:
        context = partial(self.precision.autocast, pipeline.device)
        return LossSettings(predicted, context)

    def _loss_sums(self, micro: MicroBatch, *, head: Head) -> Float[Tensor, "K+1 C"]:
        """Return sums by category; zeros on stages that do not compute the loss."""
        key = micro.batch.key
        if micro.loss is None or micro.row is None:
            empty = key.new_zeros(1 + len(head.metric_names), 0)
            return self.categories.sums(empty.double(), row=key[:0], batch=micro.batch)
        return self.categories.sums(micro.loss.values, row=micro.row, batch=micro.batch)

    def _micro_batch_forward_backward(
        self, parallel_model: ParallelModel, batch: Batch, *, predicted: Tensor, micro_batches: int
    ) -> ForwardBackwardResult:
        model = parallel_model.model
        # Of ranks that read the same rows, one counts their tokens.
        tokens = batch.num_tokens if parallel_model.counts_tokens else 0
        batch = batch.to(next(model.parameters()).device)
        with self.precision.autocast(batch.device):
            output = model(batch)
            loss = model.loss(output)
        terms = {model.config.head.loss_name: loss.total / predicted}
        terms |= loss_terms(output.records, num_micro_batches=micro_batches)
        objective = torch.stack(list(terms.values())).sum()
        objective.backward()
        accumulate_routing_stats(model, output.records)
        detached = {name: value.detach().double() for name, value in terms.items()}
        detached["objective"] = objective.detach().double()
        losses = self.categories.sums(loss.values, row=output.row, batch=batch)
        records = tuple(record.detached() for record in output.records)
        return ForwardBackwardResult(StepSums(losses, detached, tokens), records, batch)


def _merge_results(results: Iterable[ForwardBackwardResult]) -> ForwardBackwardResult:
    """Return the sums of all micro-batches, with the batch and records of the last one."""

    def merge(
        before: ForwardBackwardResult, result: ForwardBackwardResult
    ) -> ForwardBackwardResult:
        return replace(result, sums=before.sums.add(result.sums))

    return reduce(merge, results)


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with an infinite or NaN value."""
    return next((name for name, t in named if not bool(local_tensor(t).isfinite().all())), None)
