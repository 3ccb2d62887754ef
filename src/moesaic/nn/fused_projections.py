"""Fused projections: several linear maps that are stored as one matrix (q, k, v; gate and value).

An optimizer that treats a matrix as a whole (Muon) has to treat each map by itself.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.shapes import Tensor
from moesaic.nn.adapter import adapter_name


class FusedProjections(nn.Module):
    """Base of modules with fused projections."""

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        """Return the output widths of the maps in each fused matrix, by its name in this module.

        Outputs are the rows of a matrix [out, in], and the last dim of expert weights [E, in, out].
        """
        raise NotImplementedError


class PartlyBiasedLinear(nn.Linear):
    """Several maps in one matrix, some of them with a bias; ``bias`` has those biases alone."""

    def __init__(self, inputs: int, widths: Sequence[int], *, biased: Sequence[bool]) -> None:
        super().__init__(inputs, sum(widths), bias=False)
        self.widths, self.biased = tuple(widths), tuple(biased)
        parts = [width for width, has_bias in zip(widths, biased, strict=True) if has_bias]
        self.bias = nn.Parameter(torch.zeros(sum(parts)))

    def forward(self, input: Tensor) -> Tensor:
        # a tensor rank has the same share of each map
        ranks, given = sum(self.widths) // self.weight.shape[0], self.bias
        parts: list[Tensor] = []
        for width, has_bias in zip(self.widths, self.biased, strict=True):
            size = width // ranks
            parts.append(given[:size] if has_bias else given.new_zeros(size))
            given = given[size:] if has_bias else given
        return F.linear(input, self.weight, torch.cat(parts))

    def biased_widths(self) -> tuple[int, ...]:
        """Return the widths of the maps with a bias."""
        pairs = zip(self.widths, self.biased, strict=True)
        return tuple(width for width, has_bias in pairs if has_bias)


def fused_linear(inputs: int, widths: Sequence[int], *, biased: Sequence[bool]) -> nn.Linear:
    """Return several maps in one matrix, each with a bias or without one."""
    if any(biased) and not all(biased):
        return PartlyBiasedLinear(inputs, widths, biased=biased)
    return nn.Linear(inputs, sum(widths), bias=all(biased))


def gate_and_value(width: int, *, hidden: int) -> tuple[int, ...]:
    """Return the output widths of an up projection: two maps if its activation is gated."""
    return (hidden,) * (width // hidden)


def fused_outputs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the output widths of the fused matrices of a model, by parameter name in the model.

    What an adapter has of such a matrix with all of its outputs is fused as the matrix is.
    """
    found = {
        f"{path}.{name}" if path else name: widths
        for path, module in model.named_modules()
        if isinstance(module, FusedProjections)
        for name, widths in module.fused_outputs().items()
        if len(widths) > 1
    }
    named = dict(model.named_parameters())
    candidates = ((adapter_name(name, part), name) for name in found for part in ("b", "delta"))
    return found | {
        own: found[name]
        for own, name in candidates
        if own in named and named[own].dim() == named[name].dim()  # not a few values of it
    }
