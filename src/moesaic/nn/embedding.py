"""Token embedding: ids to vectors, and hidden states to logits over the vocabulary.

``backend`` looks up and scores the rows of the table (tensor parallelism replaces it).

Letters: T tokens, t tokens of this rank, N predicted tokens, V vocabulary, v rows of the table on
this rank, D model dim.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.initializer import fan_in_std, normal_parameter
from moesaic.nn.packing import Packing
from moesaic.ops.cross_entropy import TokenLoss, cross_entropy


class EmbeddingConfig(Config):
    """``tied``: one table for source, target and output. ``scaled``: inputs times sqrt(dim).

    Inputs are also multiplied by ``multiplier``, and logits are divided by ``logits_scaling``
    (Granite).
    """

    tied: bool = True
    scaled: bool = True
    multiplier: float = Field(default=1.0, gt=0)
    logits_scaling: float = Field(default=1.0, gt=0)


@runtime_checkable
class EmbeddingBackend(Protocol):
    """Lookup and loss over a table [V, D], of which this rank has the rows ``table``."""

    def embed_tokens(
        self, ids: Int[Tensor, "T"], *, table: Float[Tensor, "v D"], packing: Packing
    ) -> Float[Tensor, "t D"]:
        """Return the vectors of this rank's tokens, given the ids of all (``packing``)."""
        ...

    def embed_replicated(
        self, ids: Int[Tensor, "B"], *, table: Float[Tensor, "v D"]
    ) -> Float[Tensor, "B D"]:
        """Return the vectors of ids that are the same on every rank."""
        ...

    def loss(
        self,
        hidden: Float[Tensor, "N D"],
        *,
        table: Float[Tensor, "v D"],
        label: Int[Tensor, "N"],
        smoothing: float,
        z: float,
        sizes: Sequence[int] | None,
    ) -> TokenLoss:
        """Return the loss of the tokens that this rank predicts; ``sizes``: as each rank does."""
        ...


class LocalEmbedding:
    """The whole table is on this rank."""

    def embed_tokens(
        self, ids: Int[Tensor, "T"], *, table: Float[Tensor, "V D"], packing: Packing
    ) -> Float[Tensor, "t D"]:
        return F.embedding(ids[packing.local_tokens], table)

    def embed_replicated(
        self, ids: Int[Tensor, "B"], *, table: Float[Tensor, "V D"]
    ) -> Float[Tensor, "B D"]:
        return F.embedding(ids, table)

    def loss(
        self,
        hidden: Float[Tensor, "N D"],
        *,
        table: Float[Tensor, "V D"],
        label: Int[Tensor, "N"],
        smoothing: float,
        z: float,
        sizes: Sequence[int] | None,  # noqa: ARG002 - all of one rank
    ) -> TokenLoss:
        return cross_entropy(hidden, weight=table, label=label, label_smoothing=smoothing, z_loss=z)


class Embedding(nn.Module):
    """One table for source and target; the output table is the same one (tied) or its own."""

    def __init__(self, config: EmbeddingConfig, *, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = normal_parameter(vocab_size, dim, std=fan_in_std(dim))
        self.output = (
            self.weight if config.tied else normal_parameter(vocab_size, dim, std=fan_in_std(dim))
        )
        self.scale = (dim**0.5 if config.scaled else 1.0) * config.multiplier
        self.logits_scaling = config.logits_scaling
        self.backend: EmbeddingBackend = LocalEmbedding()

    def forward(self, ids: Int[Tensor, "T"], *, packing: Packing) -> Float[Tensor, "t D"]:
        """Return the vectors of this rank's tokens, given the ids of all tokens.

        Raises ConfigError for values that are no ids.
        """
        if ids.is_floating_point():
            found = f"numbers of shape {list(ids.shape[1:])}"
            raise ConfigError([f"model.input expects ids of tokens, but data gives {found}"])
        return self.backend.embed_tokens(ids, table=self.weight, packing=packing) * self.scale

    def embed_replicated(self, ids: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Return the vectors of ids that are the same on every rank."""
        return self.backend.embed_replicated(ids, table=self.weight) * self.scale

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Return float32 logits."""
        scaled = self._before_logits(hidden)
        return F.linear(scaled, self.output.to(hidden.dtype)).float()

    def loss(
        self,
        hidden: Float[Tensor, "N D"],
        *,
        label: Int[Tensor, "N"],
        smoothing: float = 0.0,
        z: float = 0.0,
        sizes: Sequence[int] | None = None,
    ) -> TokenLoss:
        """Return the cross-entropy of labels, computed without all logits in memory.

        ``sizes`` are the numbers of labels of the ranks that have a part of the table.
        """
        return self.backend.loss(
            self._before_logits(hidden),
            table=self.output,
            label=label,
            smoothing=smoothing,
            z=z,
            sizes=sizes,
        )

    def _before_logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return hidden if self.logits_scaling == 1 else hidden / self.logits_scaling
