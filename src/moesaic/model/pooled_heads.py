"""Heads that read one vector of each row: classes, contrastive embeddings, rewards.

Pairs are rows one after the other: row 2i and row 2i + 1 of a batch belong together, and the label
of row 2i says whether the pair is predicted (any number) or not (``IGNORE_LABEL``).

Letters: B rows, N predictions, R rows read, K tokens read, P pairs of all ranks, C classes, D model
dim, E embedding dim.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.data.batch import IGNORE_LABEL, Batch
from moesaic.distributed.collectives import all_gather_rows
from moesaic.distributed.process_groups import group_rank, group_size
from moesaic.model.head import (
    ROW_LABELS,
    Head,
    HeadLoss,
    HeadModule,
    HeadProjection,
    HeadShape,
    LinearHead,
    ModelOutput,
    Predictions,
    projection_specs,
)
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec


class Pooling(Choice):
    """Family: the vector of a row, from the states of its tokens."""

    def select(
        self, rows: Int[Tensor, "R"], *, lengths: Int[Tensor, "B"], packing: Packing
    ) -> tuple[Int[Tensor, "K"], Int[Tensor, "R"] | None]:
        """Return the tokens that are read, and how many of each row have their mean taken."""
        raise NotImplementedError


class LastToken(Pooling):
    """The state of the last token, which has read the whole row in a causal model."""

    def select(
        self, rows: Int[Tensor, "R"], *, lengths: Int[Tensor, "B"], packing: Packing
    ) -> tuple[Int[Tensor, "K"], Int[Tensor, "R"] | None]:
        del packing
        return lengths.cumsum(0)[rows] - 1, None


class FirstToken(Pooling):
    """The state of the first token, for a stack that is not causal."""

    def select(
        self, rows: Int[Tensor, "R"], *, lengths: Int[Tensor, "B"], packing: Packing
    ) -> tuple[Int[Tensor, "K"], Int[Tensor, "R"] | None]:
        del packing
        return (lengths.cumsum(0) - lengths)[rows], None


class MeanOfTokens(Pooling):
    """The mean of the states of all tokens."""

    def select(
        self, rows: Int[Tensor, "R"], *, lengths: Int[Tensor, "B"], packing: Packing
    ) -> tuple[Int[Tensor, "K"], Int[Tensor, "R"] | None]:
        read = torch.zeros_like(lengths, dtype=torch.bool).index_fill(0, rows, value=True)
        return read[packing.row].nonzero()[:, 0], lengths[rows]


class Classification(Head):
    """One of ``classes`` for each row; labels are [B] int64, ``IGNORE_LABEL`` for a row without."""

    classes: int = Field(ge=2)
    pooling: Pooling = LastToken()

    loss_name = "cross_entropy"
    metric_names = ("accuracy",)
    needs_whole_rows = True
    label_kind = ROW_LABELS

    def build(self, shape: HeadShape, /) -> "ClassHead":
        return ClassHead(shape.dim, self.classes, bias=True)

    def parameter_specs(self, shape: HeadShape, /) -> Sequence[ParameterSpec]:
        return projection_specs(shape.dim, self.classes, bias=True)

    def num_predicted(self, batch: Batch) -> int:
        return int(_labelled_rows(batch).sum())

    def select(self, batch: Batch, *, packing: Packing) -> Predictions:
        rows = _labelled_rows(batch).nonzero()[:, 0]
        lengths = batch.target.lengths
        index, means = self.pooling.select(rows, lengths=lengths, packing=packing)
        return Predictions(index, batch.labels[rows], rows, means)


class ClassHead(LinearHead):
    """Logits of classes."""

    def loss(self, output: ModelOutput, *, source: nn.Module) -> HeadLoss:
        logits = self(output.hidden, source=source)
        each = F.cross_entropy(logits, output.label, reduction="none")
        accuracy = (logits.argmax(1) == output.label).float()
        return HeadLoss(each.sum(), each.detach(), {"accuracy": accuracy})


class Contrastive(Head):
    """InfoNCE (1807.03748): of the second rows of all pairs, which belongs to a first row?

    The pairs are those of the micro-batch on all data-parallel ranks, so that the loss does not
    depend on their number. As in VLM2Vec (2410.05160): embeddings of length one, compared by their
    product over ``temperature``. ``dim`` is the width of a linear map before; None: no map.
    """

    dim: int | None = Field(default=None, ge=1)
    temperature: Annotated[float, Field(gt=0)] = 0.02
    pooling: Pooling = LastToken()

    loss_name = "contrastive"
    metric_names = ("recall@1",)
    needs_whole_rows = True
    label_kind = ROW_LABELS
    rows_per_label = 2

    def build(self, shape: HeadShape, /) -> "EmbeddingHead":
        return EmbeddingHead(self, dim=shape.dim)

    def parameter_specs(self, shape: HeadShape, /) -> Sequence[ParameterSpec]:
        return [] if self.dim is None else projection_specs(shape.dim, self.dim, bias=False)

    def num_predicted(self, batch: Batch) -> int:
        return int(_labelled_pairs(batch).sum())

    def select(self, batch: Batch, *, packing: Packing) -> Predictions:
        return _select_pairs(batch, pooling=self.pooling, packing=packing)


class EmbeddingHead(HeadModule):
    """Embeddings of length one."""

    def __init__(self, config: Contrastive, *, dim: int) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.projection = (
            None if config.dim is None else HeadProjection(dim, config.dim, bias=False)
        )

    def forward(self, hidden: Float[Tensor, "R D"], *, source: nn.Module) -> Float[Tensor, "R E"]:
        """Return the embedding of each row."""
        del source
        projected = hidden.float() if self.projection is None else self.projection(hidden)
        return F.normalize(projected, dim=1)

    def loss(self, output: ModelOutput, *, source: nn.Module) -> HeadLoss:
        every = self(output.hidden, source=source)
        pairs = every.view(len(output.row), 2, every.shape[1])  # a rank may have no pair
        first, second = pairs.unbind(1)
        ranks, group, sizes = group_size(self.data_ranks), self.data_ranks, [len(first)]
        if ranks > 1:  # the host waits: the pairs of other rows are not here
            count = torch.full((1,), len(first), device=first.device)
            sizes = all_gather_rows(count, group=group, sizes=[1] * ranks).tolist()
        candidates = all_gather_rows(second, group=group, sizes=sizes)
        own = sum(sizes[: group_rank(group)]) + torch.arange(len(first), device=first.device)
        logits = first @ candidates.t() / self.temperature
        each = F.cross_entropy(logits, own, reduction="none")
        recall = (logits.argmax(1) == own).float()
        return HeadLoss(each.sum(), each.detach(), {"recall@1": recall})


class Reward(Head):
    """A score of each row, trained on pairs of a chosen and a rejected one.

    The loss of a pair is ``-log sigmoid(score of row 2i - score of row 2i + 1)``
    (Bradley and Terry 1952, doi:10.2307/2334029; InstructGPT, 2203.02155, equation 1).
    """

    pooling: Pooling = LastToken()

    loss_name = "bradley_terry"
    metric_names = ("accuracy",)
    needs_whole_rows = True
    label_kind = ROW_LABELS
    rows_per_label = 2

    def build(self, shape: HeadShape, /) -> "ScoreHead":
        return ScoreHead(shape.dim)

    def parameter_specs(self, shape: HeadShape, /) -> Sequence[ParameterSpec]:
        return projection_specs(shape.dim, 1, bias=False)

    def num_predicted(self, batch: Batch) -> int:
        return int(_labelled_pairs(batch).sum())

    def select(self, batch: Batch, *, packing: Packing) -> Predictions:
        return _select_pairs(batch, pooling=self.pooling, packing=packing)


class ScoreHead(HeadModule):
    """One number of each row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = HeadProjection(dim, 1, bias=False)

    def forward(self, hidden: Float[Tensor, "R D"], *, source: nn.Module) -> Float[Tensor, "R"]:
        """Return the score of each row."""
        del source
        return self.score(hidden)[:, 0]

    def loss(self, output: ModelOutput, *, source: nn.Module) -> HeadLoss:
        chosen, rejected = self(output.hidden, source=source).view(-1, 2).unbind(1)
        each = F.softplus(rejected - chosen)
        accuracy = (chosen > rejected).float()
        return HeadLoss(each.sum(), each.detach(), {"accuracy": accuracy})


def _labelled_rows(batch: Batch) -> Bool[Tensor, "B"]:
    ROW_LABELS.require(batch.labels)
    return (batch.labels != IGNORE_LABEL) & (batch.target.lengths > 0)


def _labelled_pairs(batch: Batch) -> Bool[Tensor, "P"]:
    ROW_LABELS.require(batch.labels)
    first, second = (batch.target.lengths > 0).view(-1, 2).unbind(1)
    return (batch.labels[::2] != IGNORE_LABEL) & first & second


def _select_pairs(batch: Batch, *, pooling: Pooling, packing: Packing) -> Predictions:
    """Select both rows of each labelled pair; a pair counts for its first row."""
    first = 2 * _labelled_pairs(batch).nonzero()[:, 0]
    rows = torch.stack([first, first + 1], 1).flatten()
    index, means = pooling.select(rows, lengths=batch.target.lengths, packing=packing)
    return Predictions(index, batch.labels[first], first, means)
