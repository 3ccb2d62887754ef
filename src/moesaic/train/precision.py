"""Precision: the number format of the matrix products of a training step.

Weights, gradients and optimizer state stay float32 either way; routing is float32 inside the layer.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from moesaic.core.config import Choice


class Precision(Choice):
    """Family: ``Float32`` (the default) or ``BFloat16``."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context that the forward pass runs in."""
        raise NotImplementedError


class Float32(Precision):
    """Everything in float32."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()


class BFloat16(Precision):
    """Matrix products in bfloat16 by autocast; faster only where the machine multiplies it."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16)
