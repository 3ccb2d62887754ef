"""Embedding: token ids to vectors, and states back to logits over the vocabulary.

Letters: T tokens, N predicted tokens, V vocabulary, D model dim.
"""

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.config import Config
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.ops.cross_entropy import TokenLoss, cross_entropy


class EmbeddingConfig(Config):
    """``tied``: one table for source, target and output. ``scaled``: inputs times sqrt(dim)."""

    tied: bool = True
    scaled: bool = True


class Embedding(nn.Module):
    """One table for both sides' inputs; the output table is the same one or its own."""

    def __init__(self, config: EmbeddingConfig, *, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.output = self.weight if config.tied else nn.Parameter(torch.empty(vocab_size, dim))
        self.scale = dim**0.5 if config.scaled else 1.0

    def forward(self, ids: Int[Tensor, "T"]) -> Float[Tensor, "T D"]:
        return F.embedding(ids, self.weight) * self.scale

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Float32 logits of states."""
        return F.linear(hidden, self.output.to(hidden.dtype)).float()

    def loss(
        self,
        hidden: Float[Tensor, "N D"],
        *,
        label: Int[Tensor, "N"],
        smoothing: float = 0.0,
        z: float = 0.0,
    ) -> TokenLoss:
        """Cross-entropy of labels without ever holding all logits."""
        return cross_entropy(hidden, weight=self.output, label=label, smoothing=smoothing, z=z)
