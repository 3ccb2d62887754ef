"""Positional encodings: vectors added to embeddings, or rotations of queries and keys.

Letters: T tokens, D model dim, H heads, d head dim.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Shaped, Tensor
from moesaic.nn.attention_scores import RelativeBuckets
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.nn.relative_bias import RelativeBiasModule
from moesaic.nn.rotary_scaling import NoRotaryScaling, RotaryScaling

Rotation = Callable[[Tensor], Tensor]


def no_rotation(heads: Float[Tensor, "T H d"]) -> Float[Tensor, "T H d"]:
    """Return queries or keys unchanged."""
    return heads


class PositionalEncodingModule(nn.Module):
    """Base of positional encodings: adds nothing to embeddings.

    ``max_positions`` is the longest sequence that can be encoded; None: any.
    """

    max_positions: int | None = None

    def add(self, x: Float[Tensor, "T D"], _position: Int[Tensor, "T"], /) -> Float[Tensor, "T D"]:
        """Return the embeddings of tokens at these positions, encoded."""
        return x


class PositionalEncoding(Choice):
    """Family of positional encodings.

    The module adds to embeddings, once per stack; ``rotation`` is for attention, in every block.
    """

    def build(self, _dim: int, /) -> PositionalEncodingModule:
        """Return the module that adds to embeddings of ``dim`` channels; nothing by default."""
        return PositionalEncodingModule()

    def parameter_specs(self, _dim: int, /) -> Sequence[ParameterSpec]:
        """Return the parameters of that module."""
        return ()

    def rotation(
        self, _position: Int[Tensor, "T"], *, head_dim: int, length: Int[Tensor, "T"] | None = None
    ) -> Rotation:
        """Return the function that rotates the queries and keys of tokens at these positions.

        ``length`` is the length of each token's row so far, needed if it ``reads_length``.
        """
        del head_dim, length
        return no_rotation

    @property
    def reads_length(self) -> bool:
        """Whether rotations depend on the lengths of rows."""
        return False

    @property
    def biases_scores(self) -> bool:
        """Whether the attentions of a stack add one learned bias to their scores."""
        return False

    def build_score_bias(self, _heads: int, *, causal: bool) -> RelativeBiasModule | None:
        """Return the module of that bias for a stack, or None."""
        del causal
        return None

    def score_bias_specs(self, _heads: int, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the module of that bias."""
        return ()

    def rotated_channels(self, _head_dim: int, /) -> int:
        """Return the channels of a head that are rotated: as many values are saved per token."""
        return 0

    def score_factor(self) -> float:
        """Return the factor of attention scores that goes with the rotation."""
        return 1.0

    def problems(self, _head_dim: int, /) -> str | None:
        """Return what it expects where heads of ``head_dim`` channels do not fit, or None."""
        return None


class NoPositionalEncoding(PositionalEncoding):
    """NoPE: none at all; causal attention alone can represent positions (2203.16634)."""


class Rotary(PositionalEncoding):
    """Rotary position embedding (RoPE, 2104.09864): pairs of channels rotate with the position.

    ``pairing``: a pair is two neighbouring channels (as in the paper), or a channel and the one
    half a head further (GPT-NeoX, and checkpoints of Hugging Face). Only the first ``fraction`` of
    a head's channels rotates (partial rotary). ``scaling`` stretches positions for longer rows.
    """

    theta: float = Field(default=10000.0, gt=1)
    pairing: Literal["neighbouring", "halves"] = "neighbouring"
    fraction: float = Field(default=1.0, gt=0, le=1)
    scaling: RotaryScaling = NoRotaryScaling()

    def rotation(
        self, position: Int[Tensor, "T"], *, head_dim: int, length: Int[Tensor, "T"] | None = None
    ) -> Rotation:
        channels, scaling = self.rotated_channels(head_dim), self.scaling
        frequency = scaling.frequencies(
            channels // 2, theta=self.theta, length=length, device=position.device
        )
        angle = position.float()[:, None] * frequency
        phasor = torch.polar(torch.full_like(angle, scaling.magnitude()), angle)[:, None]
        rotate = _rotate_neighbours if self.pairing == "neighbouring" else _rotate_halves

        def rotate_heads(heads: Float[Tensor, "T H d"]) -> Float[Tensor, "T H d"]:
            if channels == head_dim:
                return rotate(heads.float(), phasor).to(heads.dtype)
            first, rest = heads.split([channels, head_dim - channels], -1)
            return torch.cat([rotate(first.float(), phasor).to(heads.dtype), rest], -1)

        return rotate_heads

    @property
    def reads_length(self) -> bool:
        return self.scaling.reads_length

    def rotated_channels(self, head_dim: int, /) -> int:
        return int(head_dim * self.fraction)

    def score_factor(self) -> float:
        return self.scaling.score_factor()

    def problems(self, head_dim: int, /) -> str | None:
        channels = self.rotated_channels(head_dim)
        if channels < 2 or channels % 2:
            part = f" with fraction={self.fraction}" if self.fraction < 1 else ""
            return (
                f"an even number of channels to rotate, not {channels} of head_dim={head_dim}{part}"
            )
        return self.scaling.problems(channels // 2)


class Sinusoidal(PositionalEncoding):
    """Fixed sines and cosines added to the embedding (1706.03762).

    ``offset`` is the position of a row's first token. fairseq and the models released from it
    (M2M-100, NLLB) start at 2, after the positions of padding. Learned positions need none: a table
    that starts elsewhere is another table.
    """

    offset: int = Field(default=0, ge=0)

    def build(self, dim: int, /) -> PositionalEncodingModule:
        return _SinusoidalModule(dim, offset=self.offset)


class LearnedPositions(PositionalEncoding):
    """One learned vector per position, for sequences of at most ``max_length`` tokens."""

    max_length: int = Field(default=512, ge=1)

    def build(self, dim: int, /) -> PositionalEncodingModule:
        return _LearnedPositionsModule(self, dim=dim)

    def parameter_specs(self, dim: int, /) -> Sequence[ParameterSpec]:
        return (ParameterSpec("embedding", (self.max_length, dim)),)


class RelativeBias(PositionalEncoding):
    """A learned bias of attention scores by distance and head (T5, 1910.10683, section 2.1).

    Each stack has one table, shared by its self-attentions; cross-attention has none. Distances
    from ``max_distance`` on share a bucket; half of the ``buckets`` are exact distances, and in an
    encoder each half of them is for one direction.
    """

    buckets: int = Field(default=32, ge=4)
    max_distance: int = Field(default=128, ge=2)

    @property
    def biases_scores(self) -> bool:
        return True

    def build_score_bias(self, heads: int, *, causal: bool) -> RelativeBiasModule:
        return RelativeBiasModule(self._rule(causal=causal), heads=heads)

    def score_bias_specs(self, heads: int, /) -> Sequence[ParameterSpec]:
        return (ParameterSpec("embedding", (self.buckets, heads)),)

    def problems(self, _head_dim: int, /) -> str | None:
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            return (
                f"buckets that 4 divides and max_distance above their half, not "
                f"buckets={self.buckets}, max_distance={self.max_distance}"
            )
        return None

    def _rule(self, *, causal: bool) -> RelativeBuckets:
        return RelativeBuckets(self.buckets, self.max_distance, bidirectional=not causal)


def _rotate_neighbours(
    heads: Float[Tensor, "T H d"], phasor: Shaped[Tensor, "T 1 d/2"]
) -> Float[Tensor, "T H d"]:
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * phasor).flatten(-2)


def _rotate_halves(
    heads: Float[Tensor, "T H d"], phasor: Shaped[Tensor, "T 1 d/2"]
) -> Float[Tensor, "T H d"]:
    first, second = heads.chunk(2, -1)
    # not as complex numbers: autograd would save both halves
    cos, sin = phasor.real, phasor.imag
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _SinusoidalModule(PositionalEncodingModule):
    def __init__(self, dim: int, *, offset: int) -> None:
        super().__init__()
        self.dim, self.offset = dim, offset

    def add(self, x: Float[Tensor, "T D"], position: Int[Tensor, "T"], /) -> Float[Tensor, "T D"]:
        half = self.dim // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32)
        rate = torch.exp(steps * (-math.log(1e4) / max(half - 1, 1)))
        angle = (position + self.offset).float()[:, None] * rate
        wave = torch.cat([angle.sin(), angle.cos()], -1)
        return x + nn.functional.pad(wave, (0, self.dim - 2 * half)).to(x.dtype)


class _LearnedPositionsModule(PositionalEncodingModule):
    def __init__(self, config: LearnedPositions, *, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(config.max_length, dim)
        self.max_positions = config.max_length

    def add(self, x: Float[Tensor, "T D"], position: Int[Tensor, "T"], /) -> Float[Tensor, "T D"]:
        # asynchronous on a GPU: no wait of the host, and no position shares another one's vector
        torch.ops.aten._assert_async.msg(
            (position < self.table.num_embeddings).all(),
            f"a position is beyond LearnedPositions.max_length={self.table.num_embeddings}",
        )
        return x + self.table(position)
