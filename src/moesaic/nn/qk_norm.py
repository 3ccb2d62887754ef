"""Query-key normalisation (QK-norm): norms of queries and keys, which bound attention scores.

Letters: T tokens, H heads, G key/value heads, d head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.parameter_spec import ParameterSpec


@dataclass(frozen=True, slots=True)
class HeadNumbers:
    """The numbers of query and of key/value heads, and their width."""

    heads: int
    kv_heads: int
    head_dim: int


class QKNormModule(nn.Module):
    """Base of QK-norms. ``after_rotation``: of rotated queries and keys, not of those before."""

    after_rotation: bool = False

    def normalise_query(self, x: Float[Tensor, "T H d"]) -> Float[Tensor, "T H d"]:
        """Return the norm of queries."""
        raise NotImplementedError

    def normalise_key(self, x: Float[Tensor, "T G d"]) -> Float[Tensor, "T G d"]:
        """Return the norm of keys."""
        raise NotImplementedError


class QKNorm(Choice):
    """Family of norms of queries and keys, in self-attention and in cross-attention."""

    def build(self, numbers: HeadNumbers, /) -> QKNormModule | None:
        """Return the module; None where nothing is normalised."""
        raise NotImplementedError

    def parameter_specs(self, _numbers: HeadNumbers, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the module."""
        return ()

    def tensor_refusal(self) -> str | None:
        """Return why tensor ranks cannot share the heads, or None."""
        return None


class NoQKNorm(QKNorm):
    """Queries and keys as they are projected."""

    def build(self, numbers: HeadNumbers, /) -> None:
        del numbers


class PerHeadQKNorm(QKNorm):
    """A norm over the channels of each head, one gain for all heads (Qwen3, 2505.09388; Gemma 3).

    Before rotary positions. Introduced with LayerNorm in 2302.05442.
    """

    norm: Norm = RMSNorm()

    def build(self, numbers: HeadNumbers, /) -> QKNormModule:
        return _PerHeadNorm(self.norm, numbers)

    def parameter_specs(self, numbers: HeadNumbers, /) -> Sequence[ParameterSpec]:
        return 2 * list(self.norm.parameter_specs(numbers.head_dim))


class AcrossHeadsQKNorm(QKNorm):
    """A norm over the channels of all heads together (OLMo 2, 2501.00656; OLMoE, 2409.02060).

    Before rotary positions.
    """

    norm: Norm = RMSNorm()

    def build(self, numbers: HeadNumbers, /) -> QKNormModule:
        return _AcrossHeadsNorm(self.norm, numbers)

    def parameter_specs(self, numbers: HeadNumbers, /) -> Sequence[ParameterSpec]:
        widths = (heads * numbers.head_dim for heads in (numbers.heads, numbers.kv_heads))
        return [spec for width in widths for spec in self.norm.parameter_specs(width)]

    def tensor_refusal(self) -> str | None:
        return "normalises over all heads (AcrossHeadsQKNorm), of which a tensor rank has some"


class L2QKNorm(QKNorm):
    """``x / sqrt(mean(x^2) + eps)`` of each head, without a gain, after rotation (Llama 4)."""

    eps: float = Field(default=1e-6, gt=0)

    def build(self, _numbers: HeadNumbers, /) -> QKNormModule:
        return _L2Norm(self.eps)


class _PerHeadNorm(QKNormModule):
    def __init__(self, norm: Norm, numbers: HeadNumbers) -> None:
        super().__init__()
        self.query, self.key = norm.build(numbers.head_dim), norm.build(numbers.head_dim)

    def normalise_query(self, x: Tensor) -> Tensor:
        return self.query(x)

    def normalise_key(self, x: Tensor) -> Tensor:
        return self.key(x)


class _AcrossHeadsNorm(QKNormModule):
    def __init__(self, norm: Norm, numbers: HeadNumbers) -> None:
        super().__init__()
        self.query, self.key = (
            norm.build(heads * numbers.head_dim) for heads in (numbers.heads, numbers.kv_heads)
        )

    def normalise_query(self, x: Tensor) -> Tensor:
        return self.query(x.flatten(1)).view_as(x)

    def normalise_key(self, x: Tensor) -> Tensor:
        return self.key(x.flatten(1)).view_as(x)


class _L2Norm(QKNormModule):
    after_rotation = True

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def normalise_query(self, x: Tensor) -> Tensor:
        size = x.float().square().mean(-1, keepdim=True)
        return x * torch.rsqrt(size + self.eps).to(x.dtype)

    def normalise_key(self, x: Tensor) -> Tensor:
        return self.normalise_query(x)
