"""Precision: the dtypes of parameters, gradients, their sums over ranks, and matrix products.

Norms, router logits, softmaxes, losses and optimizer states are float32 under every member.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.optim.master_weights import Float32Master, MasterWeights


class Precision(Choice):
    """Dtypes of a run: ``Float32`` (the default), ``BFloat16``, or ``BFloat16Autocast``."""

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype in which a rank holds parameters, and in which ZeRO gathers them."""
        return torch.float32

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which gradients add up over micro-batches, and wait for the update."""
        return torch.float32

    @property
    def reduce_dtype(self) -> torch.dtype:
        """The dtype in which gradients are summed over ranks."""
        return torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products and of what is sent between their ranks."""
        return self.parameter_dtype

    @property
    def master_weights(self) -> MasterWeights:
        """What the optimizer keeps beside parameters of a narrower dtype than float32."""
        return Float32Master()

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:  # noqa: ARG002
        """Return the autocast context of the forward pass."""
        return nullcontext()


class Float32(Precision):
    """Everything in float32."""


class BFloat16Autocast(Precision):
    """float32 parameters and gradients; matrix products in bfloat16 by autocast.

    It has the memory of ``Float32``, and bfloat16 copies of weights beside it.
    """

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16)


class BFloat16(Precision):
    """Parameters are held, gathered and multiplied in bfloat16; sums over ranks are float32.

    ``gradients`` is the dtype in which they add up over micro-batches: ``float32`` for many of
    them. ``master`` decides what the optimizer keeps. With AdamW a parameter takes 2 (weight) + 2
    (gradient) + 8 (moments) bytes, and 4 with ``Float32Master`` (1910.02054, section 3.1).
    """

    gradients: Literal["bfloat16", "float32"] = "bfloat16"
    master: MasterWeights = Float32Master()

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def gradient_dtype(self) -> torch.dtype:
        return torch.float32 if self.gradients == "float32" else torch.bfloat16

    @property
    def master_weights(self) -> MasterWeights:
        return self.master


def set_gradient_dtype(model: nn.Module, precision: Precision) -> None:
    """Let the gradients of all parameters have ``precision.gradient_dtype``."""
    for parameter in model.parameters():
        if parameter.dtype != precision.gradient_dtype:
            parameter.grad_dtype = precision.gradient_dtype
