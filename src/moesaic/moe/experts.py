"""Experts: one feed-forward each, held as banks of matrices and applied to rows sorted by expert.

Letters: E experts, R rows, D model dim, F hidden width (2F before a gated activation).
"""

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.feed_forward import FeedForward
from moesaic.ops.choose import pick_engine, pick_mixer
from moesaic.ops.group import Groups
from moesaic.ops.grouped import Banks, grouped_feed_forward
from moesaic.ops.mixture import Edges


class Experts(nn.Module):
    """``up`` [E, D, F] and ``down`` [E, F, D]: rows are multiplied from the left."""

    def __init__(self, config: FeedForward, *, num_experts: int, dim: int, bias: bool) -> None:
        super().__init__()
        width = config.activation.width(config.hidden)
        self.up = nn.Parameter(torch.empty(num_experts, dim, width))
        self.down = nn.Parameter(torch.empty(num_experts, config.hidden, dim))
        if bias:
            self.up_bias = nn.Parameter(torch.zeros(num_experts, width))
            self.down_bias = nn.Parameter(torch.zeros(num_experts, dim))
        self.activation, self.bias = config.activation, bias

    def forward(self, rows: Float[Tensor, "R D"], *, groups: Groups) -> Float[Tensor, "R D"]:
        """Apply each row's expert; rows past the groups come out as zero."""
        rows = _as_autocast(rows)
        return grouped_feed_forward(
            rows,
            banks=self.banks,
            groups=groups,
            activation=self.activation,
            engine=pick_engine(rows),
        )

    def mix(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of its experts' answers."""
        x = _as_autocast(x)
        mixer = pick_mixer(x, activation=self.activation)
        return mixer(x, edges=edges, banks=self.banks, activation=self.activation)

    @property
    def banks(self) -> Banks:
        biases = (self.up_bias, self.down_bias) if self.bias else (None, None)
        return Banks(self.up, self.down, *biases)


def _as_autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
