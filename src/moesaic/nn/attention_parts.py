"""Parts of attention that a config chooses: windows, sinks and temperatures.

Letters: T tokens, H heads.
"""

from typing import Self

import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.attention_scores import AttentionMask


class Window(Choice):
    """Family: which tokens of its row a token attends to, apart from causality."""

    def mask(self, *, causal: bool) -> AttentionMask:
        """Return the mask of a stack whose tokens attend to earlier ones only, or to all."""
        raise NotImplementedError

    def shrink(self) -> Self:
        """Return the same with a small size, for fast comparisons of short rows."""
        return self


class NoWindow(Window):
    """Every token of the row."""

    def mask(self, *, causal: bool) -> AttentionMask:
        return AttentionMask(causal)


class SlidingWindow(Window):
    """Tokens at a distance below ``size`` (Longformer, 2004.05150; Mistral, 2310.06825).

    In a decoder: the last ``size`` tokens with the token itself, of which alone the cache of
    decoding keeps keys and values.
    """

    size: int = Field(ge=1)

    def mask(self, *, causal: bool) -> AttentionMask:
        return AttentionMask(causal, window=self.size)

    def shrink(self) -> Self:
        return self.replace(size=min(self.size, 3))


class Chunks(Window):
    """Tokens of the same chunk: rows are cut into chunks of ``size`` tokens (Llama 4)."""

    size: int = Field(ge=1)

    def mask(self, *, causal: bool) -> AttentionMask:
        return AttentionMask(causal, chunk=self.size)

    def shrink(self) -> Self:
        return self.replace(size=min(self.size, 3))


class Sinks(Choice):
    """Family: what the weights of a query add up to.

    ``learned``: each head has a logit without a value in its softmax.
    """

    @property
    def learned(self) -> bool:
        """Whether each head has a learned logit."""
        return False


class NoSinks(Sinks):
    """Softmax over the keys: weights add up to 1."""


class LearnedSinks(Sinks):
    """A learned logit per head in each softmax, without a value (GPT-OSS, 2508.10925; 2309.17453).

    A head may thus attend to nothing. The logits start at zero.
    """

    @property
    def learned(self) -> bool:
        return True


class AttentionTemperature(Choice):
    """Family: factors of the queries by position, which act as inverse temperatures of softmax."""

    def query_factor(self, _position: Int[Tensor, "T"], /) -> Float[Tensor, "T"] | None:
        """Return the factor of each query (float32), or None where there is none."""
        return None


class FixedTemperature(AttentionTemperature):
    """The same for all queries."""


class LogPositionTemperature(AttentionTemperature):
    """Factors ``1 + weight * log(1 + floor((position + 1) / interval))``, positions from 0.

    Llama 4's layers without rotary positions have them (``attn_temperature_tuning`` in its released
    code), so that softmax stays sharp over long rows.
    """

    weight: float = Field(default=0.1, gt=0)
    interval: int = Field(default=8192, ge=1)

    def query_factor(self, position: Int[Tensor, "T"], /) -> Float[Tensor, "T"]:
        return 1 + self.weight * torch.log1p(((position + 1) // self.interval).float())
