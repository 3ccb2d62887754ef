"""Rotary scaling: slower rotations, for rows longer than those a model was trained with.

Pair i of a head rotates by ``position * frequency[i]`` with ``frequency[i] = theta ** (-i / P)``.

Letters: T tokens, P pairs of channels that rotate.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor


class RotaryScaling(Choice):
    """Family: how the frequencies of rotary position embeddings change for longer rows.

    ``reads_length``: the frequencies of a token depend on the length of its row so far.
    """

    reads_length: ClassVar[bool] = False

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "#T P"]:
        """Return the frequencies, float32: one row for all tokens, or one for each."""
        raise NotImplementedError

    def magnitude(self) -> float:
        """Return the factor of rotated queries and keys."""
        return 1.0

    def score_factor(self) -> float:
        """Return the factor of the attention scores, beside ``magnitude``."""
        return 1.0

    def problems(self, _pairs: int, /) -> str | None:
        """Return what it expects where it does not fit ``pairs`` pairs of channels, or None."""
        return None


class NoRotaryScaling(RotaryScaling):
    """The frequencies of 2104.09864."""

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "1 P"]:
        del length
        return _frequencies(pairs, theta=theta, device=device)[None]


class LinearScaling(RotaryScaling):
    """Position interpolation (2306.15595): every position is divided by ``factor``."""

    factor: float = Field(ge=1)

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "1 P"]:
        del length
        return _frequencies(pairs, theta=theta, device=device)[None] / self.factor


class NTKScaling(RotaryScaling):
    """NTK-aware scaling (in 2309.00071, section 3.1): a greater base, ``theta * factor^(d/(d-2))``.

    The slowest pair is interpolated by ``factor``, the fastest one not at all.
    """

    factor: float = Field(ge=1)

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "1 P"]:
        del length
        base = theta * self.factor ** (pairs / (pairs - 1))
        return _frequencies(pairs, theta=base, device=device)[None]

    def problems(self, pairs: int, /) -> str | None:
        return _two_pairs_problem(pairs)


class DynamicNTKScaling(RotaryScaling):
    """NTK-aware scaling by the length of each row (2309.00071, section 3.3, "Dynamic NTK").

    Up to ``original_length`` tokens nothing changes. In decoding, keys stay as they were rotated
    when their token was the newest, so beyond it decoding differs from one pass over the whole row.
    """

    reads_length = True
    factor: float = Field(ge=1)
    original_length: int = Field(ge=1)

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "T P"]:
        ratio = _given(length).float() / self.original_length
        growth = torch.where(ratio > 1, self.factor * ratio - (self.factor - 1), 1.0)
        base = theta * growth ** (pairs / (pairs - 1))
        return base[:, None] ** -_steps(pairs, device=device)

    def problems(self, pairs: int, /) -> str | None:
        return _two_pairs_problem(pairs)


class YaRN(RotaryScaling):
    """YaRN (2309.00071, section 3): interpolate pairs that rotate slowly, scale the softmax.

    Pairs that rotate more than ``beta_fast`` times within ``original_length`` tokens keep their
    frequency, those below ``beta_slow`` are divided by ``factor``, with a ramp between them, whose
    ends are whole pairs unless ``ramp_ends`` is ``"exact"`` (GPT-OSS). Rotated vectors are scaled
    by ``attention_factor`` (default ``0.1 ln(factor) + 1``). With ``mscale`` and ``mscale_all_dim``
    (DeepSeek-V2, 2405.04434) that factor is ``m(mscale) / m(mscale_all_dim)`` with
    ``m(s) = 0.1 s ln(factor) + 1``, and all scores are multiplied by ``m(mscale_all_dim)^2``.
    """

    factor: float = Field(ge=1)
    original_length: int = Field(ge=1)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    ramp_ends: Literal["whole", "exact"] = "whole"
    attention_factor: float | None = Field(default=None, gt=0)
    mscale: float | None = Field(default=None, ge=0)
    mscale_all_dim: float | None = Field(default=None, ge=0)

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "1 P"]:
        del length
        low, high = (
            pairs * math.log(self.original_length / (beta * 2 * math.pi)) / math.log(theta)
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.ramp_ends == "whole":
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        steps = torch.arange(pairs, device=device, dtype=torch.float32)
        slow = ((steps - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
        frequency = _frequencies(pairs, theta=theta, device=device)
        return (frequency / self.factor * slow + frequency * (1 - slow))[None]

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def score_factor(self) -> float:
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0


class Llama3Scaling(RotaryScaling):
    """Llama 3.1 (2407.21783): divide the frequencies of long waves, with a ramp between.

    Waves longer than ``original_length / low_freq_factor`` tokens are divided by ``factor``, those
    shorter than ``original_length / high_freq_factor`` stay.
    """

    factor: float = Field(ge=1)
    original_length: int = Field(ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "Llama3Scaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor above low_freq_factor={self.low_freq_factor}")
        return self

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "1 P"]:
        del length
        frequency = _frequencies(pairs, theta=theta, device=device)
        waves = self.original_length * frequency / (2 * math.pi)  # within the original length
        keep = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return ((1 - keep) * frequency / self.factor + keep * frequency)[None]


class LongRoPE(RotaryScaling):
    """LongRoPE (2402.13753): a searched factor per pair, of short rows and of long ones.

    Rows of at most ``original_length`` tokens have their frequencies divided by ``short_factors``,
    longer ones by ``long_factors``. As with ``DynamicNTKScaling`` decoding keeps keys as they were
    rotated. ``factor``, the longest length over the original one, gives the magnitude
    ``sqrt(1 + ln(factor) / ln(original_length))``.
    """

    reads_length = True
    factor: float = Field(ge=1)
    original_length: int = Field(ge=2)
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]

    def frequencies(
        self, pairs: int, *, theta: float, length: Int[Tensor, "T"] | None, device: torch.device
    ) -> Float[Tensor, "T P"]:
        short, long = (
            torch.tensor(factors, device=device, dtype=torch.float32)
            for factors in (self.short_factors, self.long_factors)
        )
        is_long = (_given(length) > self.original_length)[:, None]
        return _frequencies(pairs, theta=theta, device=device) / torch.where(is_long, long, short)

    def magnitude(self) -> float:
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def problems(self, pairs: int, /) -> str | None:
        found = (len(self.short_factors), len(self.long_factors))
        if found == (pairs, pairs):
            return None
        return (
            f"{pairs} short_factors and long_factors, one per pair, not {found[0]} and {found[1]}"
        )


def _steps(pairs: int, *, device: torch.device) -> Float[Tensor, "P"]:
    return torch.arange(pairs, device=device, dtype=torch.float32) / pairs


def _frequencies(pairs: int, *, theta: float, device: torch.device) -> Float[Tensor, "P"]:
    return theta ** -_steps(pairs, device=device)


def _two_pairs_problem(pairs: int) -> str | None:
    return None if pairs > 1 else "at least 2 pairs of channels that rotate"


def _given(length: Int[Tensor, "T"] | None) -> Int[Tensor, "T"]:
    if length is None:
        raise TypeError("a rotary scaling that reads the length of rows was given none")
    return length
