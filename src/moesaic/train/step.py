"""A training step: gradients of the loss over all micro-batches and ranks, then one update.

The loss is the cross-entropy summed over every predicted token of the step, divided by their number
over all micro-batches and ranks, plus each layer's own terms as the mean over micro-batches. So
neither the number of ranks nor that of micro-batches changes what a token counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.flight_recorder import mark_phase
from moesaic.distributed.world import local_tensor
from moesaic.moe.layer import accumulate_routing_stats
from moesaic.moe.routing_record import RoutingRecord, loss_terms
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.pipeline import LossSettings, MicroBatch, Pipeline
from moesaic.train.run import Precision
from moesaic.train.running_metrics import LossCategories, StepSums


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """What one forward and backward over the step's micro-batches gave on this rank."""

    sums: StepSums
    records: tuple[RoutingRecord, ...]
    batch: Batch


@dataclass(frozen=True, slots=True)
class Objective:
    """How a model is scored in training."""

    categories: LossCategories
    label_smoothing: float
    precision: Precision

    def forward_backward(
        self, parallel_model: ParallelModel, *, batches: Sequence[Batch]
    ) -> ForwardBackwardResult:
        """Add the loss's gradients to the parameters, summed over ranks. Collective.

        Returns the sums of all micro-batches, and the last one with its routing records.
        """
        counted = torch.tensor(sum(b.num_predicted for b in batches))
        predicted = int(parallel_model.data_world.all_reduce(counted))
        if parallel_model.pipeline is not None:
            passes = self._pipeline_forward_backward(parallel_model, batches, predicted=predicted)
            mark_phase("sum of gradients")
            parallel_model.sum_gradients()
            return _merge_results(passes)
        passes = []
        for number, batch in enumerate(batches):
            parallel_model.before_backward(last=number == len(batches) - 1)
            passes.append(
                self._micro_batch_forward_backward(
                    parallel_model, batch, predicted=predicted, micro_batches=len(batches)
                )
            )
        mark_phase("sum of gradients")
        parallel_model.sum_gradients()
        return _merge_results(passes)

    @torch.no_grad()
    def losses(self, parallel_model: ParallelModel, *, batch: Batch) -> Float[Tensor, "2 C"]:
        """Return summed negative log-likelihoods and counts by category, without gradients.

        They are of the tokens that are scored here. Collective.
        """
        if parallel_model.pipeline is not None:
            scoring = self._scoring(parallel_model.pipeline, predicted=1)
            (micro,) = parallel_model.pipeline.forward_only([batch], loss_settings=scoring)
            return self._loss_sums(micro)
        model = parallel_model.model
        batch = batch.to(next(model.parameters()).device)
        with self.precision.autocast(batch.source.device):
            output = model(batch)
            nll = model.loss(output).nll
        return self.categories.sums(nll, row=output.row, batch=batch)

    def _pipeline_forward_backward(
        self, parallel_model: ParallelModel, batches: Sequence[Batch], *, predicted: int
    ) -> list[ForwardBackwardResult]:
        pipeline = parallel_model.pipeline
        assert pipeline is not None
        tokens = [batch.num_tokens if parallel_model.counts_tokens else 0 for batch in batches]
        micros = pipeline.forward_backward(
            batches, loss_settings=self._scoring(pipeline, predicted=predicted)
        )
        return [
            ForwardBackwardResult(
                StepSums(self._loss_sums(micro), micro.terms, count), micro.records, micro.batch
            )
            for micro, count in zip(micros, tokens, strict=True)
        ]

    def _scoring(self, pipeline: Pipeline, *, predicted: int) -> LossSettings:
        context = partial(self.precision.autocast, pipeline.device)
        return LossSettings(predicted, self.label_smoothing, context)

    def _loss_sums(self, micro: MicroBatch) -> Float[Tensor, "2 C"]:
        """Return a micro-batch's losses by category: zeros where another stage has scored."""
        if micro.nll is None or micro.row is None:
            none = micro.batch.key.new_zeros(0)
            return self.categories.sums(none.double(), row=none, batch=micro.batch)
        return self.categories.sums(micro.nll, row=micro.row, batch=micro.batch)

    def _micro_batch_forward_backward(
        self, parallel_model: ParallelModel, batch: Batch, *, predicted: int, micro_batches: int
    ) -> ForwardBackwardResult:
        model = parallel_model.model
        tokens = (
            batch.num_tokens if parallel_model.counts_tokens else 0
        )  # the others read the same rows
        batch = batch.to(next(model.parameters()).device)
        with self.precision.autocast(batch.source.device):
            output = model(batch)
            token_loss = model.loss(output, smoothing=self.label_smoothing)
        terms = {"cross_entropy": token_loss.total / max(predicted, 1)}
        terms |= loss_terms(output.records, num_micro_batches=micro_batches)
        objective = torch.stack(list(terms.values())).sum()
        objective.backward()
        accumulate_routing_stats(model, output.records)
        shares = {name: value.detach().double() for name, value in terms.items()}
        shares["objective"] = objective.detach().double()
        losses = self.categories.sums(token_loss.nll, row=output.row, batch=batch)
        return ForwardBackwardResult(StepSums(losses, shares, tokens), output.records, batch)


def _merge_results(passes: Sequence[ForwardBackwardResult]) -> ForwardBackwardResult:
    """Return the sums of all micro-batches, and the last one with its records."""
    sums = passes[0].sums
    for other in passes[1:]:
        sums = sums.add(other.sums)
    return ForwardBackwardResult(sums, passes[-1].records, passes[-1].batch)


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds an infinity or a NaN."""
    return next((name for name, t in named if not bool(local_tensor(t).isfinite().all())), None)
