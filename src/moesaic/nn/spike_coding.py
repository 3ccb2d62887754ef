"""Spike coding: activations as integer multiples of a threshold, and integers as spike events.

SpikingBrain (2509.05276) replaces the input x of a linear map by ``s * threshold``: ``threshold =
mean|x| / k`` per token and ``s = round(x / threshold)``, with straight-through gradients. Hardware
driven by events expands the integers into spikes over virtual time steps; the weighted sum of the
events of a channel is its integer, exactly.

Letters: T tokens, D channels, E time steps.
"""

from dataclasses import dataclass
from typing import cast

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor


class ActivationCoding(Choice):
    """Family: the form in which the branches of a block read the residual stream."""

    def after(self, norm: nn.Module, /) -> nn.Module:
        """Return the module that applies ``norm`` and codes its output."""
        raise NotImplementedError


class RealValues(ActivationCoding):
    """As the norm gives them."""

    def after(self, norm: nn.Module, /) -> nn.Module:
        return norm


class IntegerSpikes(ActivationCoding):
    """Integers times a threshold per token, ``mean|x| / k`` (SpikingBrain, 2509.05276).

    A larger ``k`` rounds more finely and spikes more often.
    """

    k: float = Field(default=1.0, gt=0)

    def after(self, norm: nn.Module, /) -> nn.Module:
        return SpikingNorm(norm, k=self.k)


@dataclass(frozen=True, slots=True)
class SpikeCounts:
    """Integers of a token's channels, and its threshold."""

    count: Int[Tensor, "T D"]
    threshold: Float[Tensor, "T 1"]

    @staticmethod
    def of(x: Float[Tensor, "T D"], *, k: float) -> "SpikeCounts":
        """Count the spikes of activations; a token of zeros has none."""
        threshold = x.abs().mean(-1, keepdim=True) / k
        step = threshold.where(threshold > 0, 1.0)
        return SpikeCounts(torch.round(x / step).to(torch.int64), threshold)

    def values(self) -> Float[Tensor, "T D"]:
        """Return the activations that the counts stand for."""
        return self.count * self.threshold


class SpikingNorm(nn.Module):
    """A norm whose output is coded as integer spikes; gradients are those of the norm alone."""

    def __init__(self, norm: nn.Module, *, k: float) -> None:
        super().__init__()
        self.norm, self.k = norm, k

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        normed = self.norm(x)
        with torch.no_grad():
            change = SpikeCounts.of(normed, k=self.k).values().to(normed.dtype) - normed
        return normed + change

    def counts(self, x: Float[Tensor, "T D"]) -> SpikeCounts:
        """Return the spikes that the branch reads."""
        return SpikeCounts.of(self.norm(x), k=self.k)


@dataclass(frozen=True, slots=True)
class SpikeEvents:
    """Events of time steps, each -1, 0 or 1, and the weight of each step."""

    event: Int[Tensor, "E T D"]
    weight: Int[Tensor, "E"]

    def counts(self) -> Int[Tensor, "T D"]:
        """Return the weighted sum over the time steps."""
        return (self.event * self.weight[:, None, None]).sum(0)

    def sparsity(self) -> float:
        """Return the share of time steps and channels without an event."""
        silent = (self.event == 0).sum() / max(1, self.event.numel())
        return cast("float", silent.item())


class SpikeCoding(Choice):
    """Family: how the integer of a channel is expanded into events (SpikingBrain, 2509.05276)."""

    def events(self, counts: Int[Tensor, "T D"]) -> SpikeEvents:
        """Return as many time steps as the largest count needs.

        Raises ValueError for negative counts where events have no sign.
        """
        raise NotImplementedError


class BinarySpikes(SpikeCoding):
    """One event of 1 for each unit of a count that is not negative (a rate code)."""

    def events(self, counts: Int[Tensor, "T D"]) -> SpikeEvents:
        if (counts < 0).any():
            raise ValueError("binary spikes have no sign: expected counts of at least 0")
        return TernarySpikes().events(counts)


class TernarySpikes(SpikeCoding):
    """One event of 1 or -1 for each unit of a count: as many time steps as the largest."""

    def events(self, counts: Int[Tensor, "T D"]) -> SpikeEvents:
        size = counts.abs()
        step = torch.arange(_largest(size), device=counts.device)
        event = (step[:, None, None] < size) * counts.sign()
        return SpikeEvents(event, torch.ones_like(step))


class BitwiseSpikes(SpikeCoding):
    """One event for each bit of a count, with its sign: time steps grow with the logarithm."""

    def events(self, counts: Int[Tensor, "T D"]) -> SpikeEvents:
        size = counts.abs()
        bit = torch.arange(_largest(size).bit_length(), device=counts.device)
        event = (size >> bit[:, None, None] & 1) * counts.sign()
        return SpikeEvents(event, 1 << bit)


def _largest(size: Tensor) -> int:
    return int(size.max()) if size.numel() else 0
