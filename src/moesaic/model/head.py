"""Head: what a model predicts from its last hidden states, with its loss; the vocabulary's head.

``ModelConfig.head`` chooses one. A head selects the states that it reads, sums the loss of what it
predicts, and counts it: the objective divides by the count of all ranks and micro-batches. The
other heads are in ``value_heads.py`` and ``pooled_heads.py``.

Letters: B rows, L target length, T tokens of this rank, N predictions, K states read for them (of
a loss: values of a prediction), D model dim, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.copies import copy_without_waiting
from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.data.batch import IGNORE_LABEL, Batch
from moesaic.distributed.process_groups import Group
from moesaic.model.inputs import ModelInput, TokenIds
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.embedding import Embedding
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a head may read of the model that it is built for."""

    dim: int
    vocab_size: int = 0


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a head predicts of a batch, on this rank.

    ``index`` are the tokens whose states are read, None for all; with ``lengths`` the means of so
    many of them one after the other. ``row`` is the row of the batch that each prediction counts
    for, in metrics. ``sizes`` are the numbers of predictions of the ranks of this tensor parallel
    group, of a head that needs them.
    """

    index: Int[Tensor, "K"] | None
    label: Tensor
    row: Int[Tensor, "N"]
    lengths: Int[Tensor, "M"] | None = None
    sizes: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "Predictions":
        """Return the same predictions on ``device``; the host does not wait for the copies."""
        index, lengths = (
            None if part is None else copy_without_waiting(part, device)
            for part in (self.index, self.lengths)
        )
        label, row = (copy_without_waiting(part, device) for part in (self.label, self.row))
        return Predictions(index, label, row, lengths, self.sizes)


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """The states that the head reads, after the last norm, and what it is to predict.

    Of a language model they are the decoder states at the predicted positions only, in row-major
    order (K = N): positions without a label cost nothing. ``records`` are the routing records,
    ``sizes`` those of ``Predictions``.
    """

    hidden: Float[Tensor, "K D"]
    label: Tensor
    row: Int[Tensor, "N"]
    records: tuple[RoutingRecord, ...]
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """``total``: the sum over predictions of the training loss, in the autograd graph.

    ``each``: the loss of each prediction, detached; of a language model its negative
    log-likelihood. ``metrics`` are further values of each prediction, by name.
    """

    total: Float[Tensor, ""]
    each: Float[Tensor, "N"]
    metrics: Mapping[str, Float[Tensor, "N"]] = field(default_factory=dict)

    @property
    def values(self) -> Float[Tensor, "K N"]:
        """The loss and the metrics of each prediction."""
        return torch.stack([self.each, *self.metrics.values()])


@dataclass(frozen=True, slots=True)
class LabelKind:
    """The labels that a head reads: their number of dims, and whether they are numbers or ids."""

    text: str
    dims: int
    dtype_is_floating: bool

    def require(self, labels: Tensor) -> None:
        """Raise ConfigError if the labels of a batch are of another kind."""
        if (labels.dim(), labels.is_floating_point()) != (self.dims, self.dtype_is_floating):
            found = f"{str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}"
            raise ConfigError(
                [
                    f"model.head expects {self.text} as labels, but data gives {found}: choose "
                    "another head, or other data"
                ]
            )


ROW_LABELS = LabelKind("one id of each row [B]", 1, dtype_is_floating=False)
TOKEN_LABELS = LabelKind("one id of each token [B, L]", 2, dtype_is_floating=False)
POINT_LABELS = LabelKind("one number of each point [B, L]", 2, dtype_is_floating=True)
PATCH_LABELS = LabelKind("the numbers of each patch [B, S, C]", 3, dtype_is_floating=True)


class HeadModule(nn.Module):
    """Base of the modules of heads.

    ``data_ranks`` is the group of ranks that have the other rows of the batch, for a head that
    compares rows; None where this rank has them all.
    """

    data_ranks: Group = None

    def forward(self, hidden: Float[Tensor, "K D"], *, source: nn.Module) -> Tensor:
        """Return the predictions for these states; ``source`` is the module of the model's input.

        What they are is a matter of the head: logits, values of a series, a score.
        """
        raise NotImplementedError

    def loss(self, output: ModelOutput, *, source: nn.Module) -> HeadLoss:
        """Return the loss of an output, and the values of the head's metrics."""
        raise NotImplementedError


class LinearHead(HeadModule):
    """Base of heads that predict by one linear map; a member adds the loss."""

    def __init__(self, dim: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.projection = HeadProjection(dim, outputs, bias=bias)

    def forward(self, hidden: Float[Tensor, "N D"], *, source: nn.Module) -> Float[Tensor, "N C"]:
        """Return float32 values: logits of classes, scores, channels of a patch."""
        del source
        return self.projection(hidden)


class HeadProjection(CustomInitializers):
    """A linear map at the end of a model; optimizers see its matrix as an embedding."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)

    def initializers(self) -> Mapping[str, Initializer]:
        return {"linear.weight": Initializer("embedding")}

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        return self.linear(x).float()


def projection_specs(inputs: int, outputs: int, *, bias: bool) -> list[ParameterSpec]:
    """Return the parameters of a ``HeadProjection``."""
    biases = [ParameterSpec("bias", (outputs,))] if bias else []
    return [ParameterSpec("embedding", (outputs, inputs)), *biases]


class Head(Choice):
    """Family: what the model predicts. A member counts, selects and builds; see ``HeadModule``.

    ``loss_name`` names the loss among the terms of the objective, ``metric_names`` the metrics in
    their order. A head that ``needs_whole_rows`` cannot share a row with other ranks. It reads
    labels of ``label_kind``, one for ``rows_per_label`` rows that follow each other.
    """

    loss_name: ClassVar[str] = "loss"
    metric_names: ClassVar[tuple[str, ...]] = ()
    reads_table: ClassVar[bool] = False
    needs_whole_rows: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = TOKEN_LABELS
    rows_per_label: ClassVar[int] = 1

    def build(self, shape: HeadShape, /) -> HeadModule:
        """Return the module."""
        raise NotImplementedError

    def problems(self, _source: ModelInput, /) -> str | None:
        """Return what the head expects where it does not fit the model's input, or None."""
        return None

    def parameter_specs(self, _shape: HeadShape, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the module, to count a model without building it."""
        return ()

    def training_batch(self, batch: Batch) -> Batch:
        """Return the batch that the model is trained on, made from the data's."""
        return batch

    def num_predicted(self, batch: Batch) -> int:
        """Return the number of predictions of a batch, in the loss."""
        raise NotImplementedError

    def select(self, batch: Batch, *, packing: Packing) -> Predictions:
        """Return which states are read, and the labels.

        Their number depends on the labels, so a batch that was copied to a device is passed as it
        is in host memory: the host does not wait for the device then.
        """
        raise NotImplementedError


class LanguageModelHead(Head):
    """The next token: logits over the vocabulary, by the output table of the embedding.

    The table is the input's (tied) or its own (``ModelConfig.embedding``). Label smoothing is that
    of 1512.00567.
    """

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    loss_name = "cross_entropy"
    reads_table = True

    def build(self, shape: HeadShape, /) -> "VocabularyHead":
        del shape
        return VocabularyHead(self.label_smoothing)

    def problems(self, source: ModelInput, /) -> str | None:
        if isinstance(source, TokenIds):
            return None
        return "input=TokenIds, whose table it scores: choose another head for other inputs"

    def num_predicted(self, batch: Batch) -> int:
        self.label_kind.require(batch.labels)
        return batch.num_predicted

    def select(self, batch: Batch, *, packing: Packing) -> Predictions:
        local, label = packing.local_tokens, batch.labels.flatten()[packing.index]
        sizes = None
        if packing.partition is not None:
            group = (label != IGNORE_LABEL)[packing.gathered_tokens]
            sizes = tuple(int(part.sum()) for part in group.split(packing.partition.tensor_sizes))
        label, row = label[local], packing.row[local]
        if batch.num_predicted == packing.num_tokens:
            return Predictions(None, label, row, sizes=sizes)
        predicted = (label != IGNORE_LABEL).nonzero()[:, 0]
        return Predictions(predicted, label[predicted], row[predicted], sizes=sizes)


class VocabularyHead(HeadModule):
    """Logits and cross-entropy over the rows of the embedding's output table."""

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, hidden: Float[Tensor, "N D"], *, source: nn.Module) -> Float[Tensor, "N V"]:
        """Return float32 logits over the vocabulary."""
        return _table(source).logits(hidden)

    def loss(self, output: ModelOutput, *, source: nn.Module) -> HeadLoss:
        """Return the summed token loss of an output, in chunks (``ops/cross_entropy.py``)."""
        found = _table(source).loss(
            output.hidden,
            label=output.label,
            smoothing=self.label_smoothing,
            sizes=output.sizes,
        )
        return HeadLoss(found.total, found.nll)


def _table(source: nn.Module) -> Embedding:
    assert isinstance(source, Embedding), "a language model reads token ids"
    return source


def mean_of_spans(states: Float[Tensor, "K D"], lengths: Int[Tensor, "M"]) -> Float[Tensor, "M D"]:
    """Return the means of ``lengths`` rows each, one span after the other."""
    return torch.segment_reduce(states, "mean", lengths=lengths, unsafe=True)
