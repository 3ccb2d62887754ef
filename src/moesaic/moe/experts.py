"""Experts: one feed-forward each, held as banks of matrices and applied to rows sorted by expert.

Letters: E experts, R rows, D model dim, F hidden width (2F before a gated activation).
"""

import torch
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.nn.feed_forward import FeedForward
from moesaic.ops.choose import pick_engine
from moesaic.ops.group import Groups
from moesaic.ops.grouped import Banks, grouped_feed_forward


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
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        biases = (self.up_bias, self.down_bias) if self.bias else (None, None)
        return grouped_feed_forward(
            rows,
            banks=Banks(self.up, self.down, *biases),
            groups=groups,
            activation=self.activation,
            engine=pick_engine(rows),
        )
