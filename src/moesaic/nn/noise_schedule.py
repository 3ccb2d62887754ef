"""Noise schedules of diffusion models: rectified flow, and DDPM with its deterministic sampler.

Time is a number from 0 (clean) to 1 (noise alone). Letters: B rows, the rest of a shape free.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


class NoiseSchedule(Choice):
    """Family: how noise is added, what the model predicts, and a step back to less noise."""

    def noisy(
        self, clean: Float[Tensor, "B *"], *, noise: Tensor, time: Float[Tensor, "B"]
    ) -> Float[Tensor, "B *"]:
        """Return ``clean`` with the noise of ``time``."""
        raise NotImplementedError

    def target(self, clean: Float[Tensor, "B *"], *, noise: Tensor) -> Float[Tensor, "B *"]:
        """Return what the model is to predict."""
        raise NotImplementedError

    def step(
        self, x: Float[Tensor, "B *"], *, prediction: Tensor, time: float, to: float
    ) -> Float[Tensor, "B *"]:
        """Return the sample at the earlier time ``to``, given the prediction at ``time``."""
        raise NotImplementedError


class RectifiedFlow(NoiseSchedule):
    """Straight lines from data to noise (Liu et al. 2022, 2209.03003).

    ``x_t = (1 - t) x_0 + t noise``; the model predicts the velocity ``noise - x_0``; a step is
    Euler's.
    """

    def noisy(
        self, clean: Float[Tensor, "B *"], *, noise: Tensor, time: Float[Tensor, "B"]
    ) -> Float[Tensor, "B *"]:
        return torch.lerp(clean, noise, _per_row(time, clean))

    def target(self, clean: Float[Tensor, "B *"], *, noise: Tensor) -> Float[Tensor, "B *"]:
        return noise - clean

    def step(
        self, x: Float[Tensor, "B *"], *, prediction: Tensor, time: float, to: float
    ) -> Float[Tensor, "B *"]:
        return x + (to - time) * prediction


class DDPM(NoiseSchedule):
    """Variance-preserving diffusion in ``steps`` steps (Ho et al. 2020, 2006.11239).

    The share of the signal's variance, alpha-bar, follows the paper's linear betas or the cosine of
    Nichol and Dhariwal 2021 (2102.09672); the model predicts the noise; a step is DDIM's
    (2010.02502, eta = 0), which needs few steps and no random numbers.
    """

    steps: int = Field(default=1000, ge=2)
    betas: Literal["linear", "cosine"] = "linear"

    def signal(self, time: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return alpha-bar: 1 at time 0, nearly 0 at time 1."""
        if self.betas == "cosine":
            angle = (time + 0.008) / 1.008 * math.pi / 2
            start = math.cos(0.008 / 1.008 * math.pi / 2)
            return ((angle.cos() / start) ** 2).clamp(1e-5, 1.0)
        scale = 1000 / self.steps  # the paper's betas are those of 1000 steps
        place = time.double() * self.steps
        beta = torch.linspace(
            1e-4 * scale, 0.02 * scale, self.steps, dtype=place.dtype, device=place.device
        )
        table = torch.cat([place.new_ones(1), (1 - beta).cumprod(0)])
        low = place.floor().clamp(0, self.steps - 1)
        index = low.long()
        return torch.lerp(table[index], table[index + 1], place - low).to(time)

    def noisy(
        self, clean: Float[Tensor, "B *"], *, noise: Tensor, time: Float[Tensor, "B"]
    ) -> Float[Tensor, "B *"]:
        signal = _per_row(self.signal(time), clean)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def target(self, clean: Float[Tensor, "B *"], *, noise: Tensor) -> Float[Tensor, "B *"]:
        del clean
        return noise

    def step(
        self, x: Float[Tensor, "B *"], *, prediction: Tensor, time: float, to: float
    ) -> Float[Tensor, "B *"]:
        before, after = self.signal(torch.tensor([time, to], dtype=torch.float64)).tolist()
        clean = (x - math.sqrt(1 - before) * prediction) / math.sqrt(before)
        return math.sqrt(after) * clean + math.sqrt(1 - after) * prediction


def denoise(
    noise: Float[Tensor, "B *"], *, predict: Predict, schedule: NoiseSchedule, steps: int
) -> Float[Tensor, "B *"]:
    """Return samples made from ``noise`` in ``steps`` equal steps of time.

    ``predict(x, time)`` is the model, time [B].
    """
    x = noise
    for number in range(steps, 0, -1):
        time, to = number / steps, (number - 1) / steps
        now = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        x = schedule.step(x, prediction=predict(x, now), time=time, to=to)
    return x


def _per_row(value: Float[Tensor, "B"], like: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (like.dim() - 1))
