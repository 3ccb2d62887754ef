"""Attention config: the numbers of heads, their width, and the parts of attention."""

from typing import Literal

from pydantic import Field

from moesaic.core.config import Config
from moesaic.nn.attention_parts import (
    AttentionTemperature,
    FixedTemperature,
    NoSinks,
    NoWindow,
    Sinks,
    Window,
)
from moesaic.nn.positional_encoding import PositionalEncoding
from moesaic.nn.qk_norm import HeadNumbers, NoQKNorm, QKNorm

Projection = Literal["query", "key", "value", "output"]


class AttentionConfig(Config):
    """``kv_heads`` < ``heads`` shares keys and values between heads (grouped, 2305.13245).

    ``head_dim`` defaults to ``dim / heads``. ``bias`` are the projections with a bias; None: all of
    them where ``model.bias`` is true, else none. Queries, keys and values are limited to
    ``-clip ... clip`` (DBRX, OLMo). Scores are ``scale * q . k``, by default ``head_dim ** -0.5``
    times the factor of the rotary scaling, and limited smoothly to ``softcap`` (Gemma 2,
    2408.00118). Windows, sinks and temperatures are for self-attention alone.
    """

    heads: int = Field(ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    bias: tuple[Projection, ...] | None = None
    qk_norm: QKNorm = NoQKNorm()
    window: Window = NoWindow()
    sinks: Sinks = NoSinks()
    temperature: AttentionTemperature = FixedTemperature()
    clip: float | None = Field(default=None, gt=0)
    scale: float | None = Field(default=None, gt=0)
    softcap: float | None = Field(default=None, gt=0)

    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    def head_width(self, dim: int) -> int:
        """Channels per head."""
        return self.head_dim or dim // self.heads

    def widths(self, dim: int) -> tuple[int, int]:
        """Channels of all queries, and of all keys (values have as many)."""
        width = self.head_width(dim)
        return self.heads * width, self.num_kv_heads() * width

    def numbers(self, dim: int) -> HeadNumbers:
        """The numbers of heads, and their width."""
        return HeadNumbers(self.heads, self.num_kv_heads(), self.head_width(dim))

    def has_bias(self, *projections: Projection, default: bool) -> tuple[bool, ...]:
        """Return which projections have a bias; ``default`` is the model's."""
        return tuple(default if self.bias is None else name in self.bias for name in projections)

    def score_scale(self, position: PositionalEncoding, *, dim: int) -> float | None:
        """Return the factor of ``q . k``; None: ``head_dim ** -0.5``."""
        if self.scale is not None:
            return self.scale
        factor = position.score_factor()
        return None if factor == 1 else self.head_width(dim) ** -0.5 * factor

    def problems(self, dim: int, *, position: PositionalEncoding) -> str | None:
        """Return what these numbers of heads expect in a model of ``dim`` channels, or None."""
        if self.head_dim is None and dim % self.heads:
            return f"attention.heads={self.heads} to divide dim={dim}"
        if self.heads % self.num_kv_heads():
            return f"attention.kv_heads={self.num_kv_heads()} to divide heads={self.heads}"
        problem = position.problems(self.head_width(dim))
        return problem and f"{problem} ({type(position).__name__})"
