"""Shapes of an MoE layer with a name, and loads of its experts."""

from dataclasses import dataclass

import torch

from moesaic.core.errors import UserError, did_you_mean
from moesaic.core.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Tokens of dim numbers, experts of a hidden width, k of them for each token."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int

    @property
    def rows(self) -> int:
        """Rows that go through an expert: what a dense layer of equal work would get."""
        return self.tokens * self.k

    @property
    def flops(self) -> int:
        """Of the experts' three matrices, forward."""
        return 6 * self.rows * self.dim * self.hidden

    @property
    def min_saved_values(self) -> int:
        """Values that a backward pass cannot do without: x and the gated pre-activation."""
        return self.tokens * self.dim + 2 * self.rows * self.hidden

    def __str__(self) -> str:
        return ",".join(str(n) for n in (self.tokens, self.dim, self.hidden, self.experts, self.k))


LAYER_SHAPES = {
    "A": LayerShape(2048, 512, 1408, 8, 2),  # few large experts, as in Mixtral
    "B": LayerShape(4096, 512, 512, 64, 6),  # many small ones, as in DeepSeekMoE
    "C": LayerShape(64, 512, 512, 64, 6),  # the same while decoding: a few rows per expert
    "D": LayerShape(8192, 768, 2048, 16, 1),  # one expert per token, as in Switch
}


def parse_shape(text: str) -> LayerShape:
    """Return ``SHAPES[text]``, or the shape of ``tokens,dim,hidden,experts,k``."""
    if text.upper() in LAYER_SHAPES:
        return LAYER_SHAPES[text.upper()]
    numbers = text.split(",")
    if len(numbers) != 5 or not all(n.strip().isdecimal() and int(n) for n in numbers):
        known = f"{', '.join(LAYER_SHAPES)}{did_you_mean(text, LAYER_SHAPES)}"
        raise UserError(
            f'"{text}" is no shape: expected one of {known}, or five numbers '
            "tokens,dim,hidden,experts,k such as 2048,512,1408,8,2"
        )
    shape = LayerShape(*(int(n) for n in numbers))
    if shape.k > shape.experts:
        raise UserError(
            f"shape {text}: k={shape.k} of {shape.experts} experts; k may be at most that"
        )
    return shape


def zipf_bias(logits: Float[Tensor, "T E"], *, k: int, rounds: int = 60) -> Float[Tensor, "E"]:
    """What to add to logits so that expert e is chosen in proportion to 1 / (e + 1).

    A token chooses an expert at most once, so no expert gets more than all tokens.
    """
    tokens, experts = logits.shape
    share = 1 / torch.arange(1, experts + 1, dtype=torch.float32)
    target = share / share.sum() * k
    while (target > 1).any():  # what is above goes to the others
        full = target >= 1
        target = torch.where(full, 1.0, share * (k - full.sum()) / share[~full].sum())
    bias = torch.zeros(experts)
    for turn in range(rounds):
        chosen = (logits + bias).topk(k, dim=-1).indices.flatten()
        load = torch.bincount(chosen, minlength=experts) / tokens
        bias += 2 / (1 + turn / 10) * (target - load) / (target + load).clamp(min=1e-3)
    return bias - bias.mean()
