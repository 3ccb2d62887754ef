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
    """Base of QK-norms: changes nothing, before or after rotary positions."""

    def before_rotation(
        self, query: Float[Tensor, "T H d"], key: Float[Tensor, "T G d"]
    ) -> tuple[Float[Tensor, "T H d"], Float[Tensor, "T G d"]]:
        """Return queries and keys as they are rotated."""
        return query, key

    def after_rotation(
        self, query: Float[Tensor, "T H d"], key: Float[Tensor, "T G d"]
    ) -> tuple[Float[Tensor, "T H d"], Float[Tensor, "T G d"]]:
        """Return queries and keys as their products are taken."""
        return query, key


class QKNorm(Choice):
    """Family of norms of queries and keys.

    Queries and keys may also be those of different tokens (cross-attention); each is normalised by
    itself.
    """

    def build(self, _numbers: HeadNumbers, /) -> QKNormModule:
        """Return the module."""
        return QKNormModule()

    def parameter_specs(self, _numbers: HeadNumbers, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the module."""
        return ()

    def saved_activations(self, _numbers: HeadNumbers, /) -> tuple[int, int]:
        """Return the values per token that autograd saves, of queries and of keys."""
        return 0, 0

    def tensor_refusal(self) -> str | None:
        """Return why tensor ranks cannot share the heads, or None."""
        return None


class NoQKNorm(QKNorm):
    """Queries and keys as they are projected."""


class PerHeadQKNorm(QKNorm):
    """A norm over the channels of each head, one gain for all heads (Qwen3, 2505.09388; Gemma 3).

    Before rotary positions. Introduced with LayerNorm in 2302.05442.
    """

    norm: Norm = RMSNorm()

    def build(self, numbers: HeadNumbers, /) -> QKNormModule:
        return _PerHeadNorm(self.norm, numbers)

    def parameter_specs(self, numbers: HeadNumbers, /) -> Sequence[ParameterSpec]:
        return 2 * list(self.norm.parameter_specs(numbers.head_dim))

    def saved_activations(self, numbers: HeadNumbers, /) -> tuple[int, int]:
        each = self.norm.saved_statistics()
        return numbers.heads * each, numbers.kv_heads * each


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

    def saved_activations(self, numbers: HeadNumbers, /) -> tuple[int, int]:
        del numbers
        return self.norm.saved_statistics(), self.norm.saved_statistics()

    def tensor_refusal(self) -> str | None:
        return "normalises over all heads (AcrossHeadsQKNorm), of which a tensor rank has some"


class L2QKNorm(QKNorm):
    """``x / sqrt(mean(x^2) + eps)`` of each head, without a gain, after rotation (Llama 4)."""

    eps: float = Field(default=1e-6, gt=0)

    def build(self, _numbers: HeadNumbers, /) -> QKNormModule:
        return _L2Norm(self.eps)

    def saved_activations(self, numbers: HeadNumbers, /) -> tuple[int, int]:
        each = numbers.head_dim + 1
        return numbers.heads * each, numbers.kv_heads * each


class _PerHeadNorm(QKNormModule):
    def __init__(self, norm: Norm, numbers: HeadNumbers) -> None:
        super().__init__()
        self.query, self.key = norm.build(numbers.head_dim), norm.build(numbers.head_dim)

    def before_rotation(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.query(query.flatten(0, 1)).view_as(query),
            self.key(key.flatten(0, 1)).view_as(key),
        )


class _AcrossHeadsNorm(QKNormModule):
    def __init__(self, norm: Norm, numbers: HeadNumbers) -> None:
        super().__init__()
        self.query, self.key = (
            norm.build(heads * numbers.head_dim) for heads in (numbers.heads, numbers.kv_heads)
        )

    def before_rotation(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(query.flatten(1)).view_as(query), self.key(key.flatten(1)).view_as(key)


class _L2Norm(QKNormModule):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def after_rotation(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._norm(query), self._norm(key)

    def _norm(self, x: Tensor) -> Tensor:
        size = x.float().square().mean(-1, keepdim=True)
        return x * torch.rsqrt(size + self.eps).to(x.dtype)
