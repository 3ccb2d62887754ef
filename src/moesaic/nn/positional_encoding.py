"""Positional encodings: vectors added to embeddings, or rotations of queries and keys.

Letters: T tokens, D model dim, H heads, d head dim.
"""

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Float, Int, Tensor

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

    def build(self, *, dim: int, head_dim: int) -> PositionalEncodingModule:
        """Return the module."""
        raise NotImplementedError

    def rotation(self, _position: Int[Tensor, "T"], *, head_dim: int) -> Rotation:
        """Return the function that rotates the queries and keys of tokens at these positions."""
        del head_dim
        return no_rotation

    def rotated_channels(self, _head_dim: int, /) -> int:
        """Return the channels of a head that are rotated: as many values are saved per token."""
        return 0


class NoPositionalEncoding(PositionalEncoding):
    """NoPE: none at all; causal attention alone can represent positions (2203.16634)."""

    def build(self, *, dim: int, head_dim: int) -> PositionalEncodingModule:  # noqa: ARG002
        return PositionalEncodingModule()


class Rotary(PositionalEncoding):
    """Rotary position embedding (RoPE, 2104.09864): neighbouring channels rotate as pairs."""

    theta: float = Field(default=10000.0, gt=1)

    def build(self, *, dim: int, head_dim: int) -> PositionalEncodingModule:  # noqa: ARG002
        if head_dim % 2:
            raise ConfigError(
                [f"position: Rotary rotates pairs, so head_dim={head_dim} must be even"]
            )
        return PositionalEncodingModule()

    def rotation(self, position: Int[Tensor, "T"], *, head_dim: int) -> Rotation:
        pairs = head_dim // 2
        steps = torch.arange(pairs, device=position.device, dtype=torch.float32)
        angle = position.float()[:, None] * self.theta ** (-steps / pairs)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def rotate(heads: Float[Tensor, "T H d"]) -> Float[Tensor, "T H d"]:
            by_pair = heads.float().unflatten(-1, (-1, 2))
            turned = torch.view_as_complex(by_pair.contiguous()) * turn
            return torch.view_as_real(turned).flatten(-2).to(heads.dtype)

        return rotate

    def rotated_channels(self, head_dim: int, /) -> int:
        return head_dim


class Sinusoidal(PositionalEncoding):
    """Fixed sines and cosines added to the embedding (1706.03762).

    ``offset`` is the position of a row's first token. fairseq and the models released from it
    (M2M-100, NLLB) start at 2, after the positions of padding. Learned positions need none: a table
    that starts elsewhere is another table.
    """

    offset: int = Field(default=0, ge=0)

    def build(self, *, dim: int, head_dim: int) -> PositionalEncodingModule:  # noqa: ARG002
        return _SinusoidalModule(dim, offset=self.offset)


class LearnedPositions(PositionalEncoding):
    """One learned vector per position, for sequences of at most ``max_length`` tokens."""

    max_length: int = Field(default=512, ge=1)

    def build(self, *, dim: int, head_dim: int) -> PositionalEncodingModule:  # noqa: ARG002
        return _LearnedPositionsModule(self, dim=dim)


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
