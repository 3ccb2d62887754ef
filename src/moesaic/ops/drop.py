"""Drop: which channels of a token dropout sets to zero, as a function of the token's key.

Four channels share a hash: each looks at 16 of its 64 bits. So the rate is a multiple of 2**-16,
and what is kept is scaled by exactly that: nothing is lost on average.

Letters: T tokens, D channels.
"""

import torch

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.ops.random import hash_combine

_CHANNELS_PER_HASH, _HASH_VALUES = 4, 2**16


def dropout(x: Float[Tensor, "T D"], *, key: Int[Tensor, "T"], rate: float) -> Float[Tensor, "T D"]:
    """Set channels to zero with probability ``rate`` in (0, 1), and scale the others.

    Backward keeps one byte per channel: hashing again would cost more than reading it.
    """
    scale = _HASH_VALUES / (_HASH_VALUES - _drop_threshold(rate))
    return (x * scale).masked_fill(dropout_mask(key, width=x.shape[-1], rate=rate), 0.0)


def dropout_mask(key: Int[Tensor, "T"], *, width: int, rate: float) -> Bool[Tensor, "T D"]:
    """Return which channels are lost."""
    column = torch.arange(-(-width // _CHANNELS_PER_HASH), device=key.device)
    values = hash_combine(key[:, None], column).view(torch.int16)
    return values[:, :width] < _drop_threshold(rate) - _HASH_VALUES // 2


def reference_dropout_mask(key: Int[Tensor, "T"], *, width: int, rate: float) -> Bool[Tensor, "T D"]:
    """The definition of ``dropped``, one channel at a time."""
    lost = torch.zeros(len(key), width, dtype=torch.bool, device=key.device)
    for channel in range(width):
        bits = hash_combine(key, torch.full_like(key, channel // _CHANNELS_PER_HASH)) >> 16 * (channel % _CHANNELS_PER_HASH)
        lost[:, channel] = (bits + _HASH_VALUES // 2) % _HASH_VALUES < _drop_threshold(rate)
    return lost


def _drop_threshold(rate: float) -> int:
    return min(max(round(rate * _HASH_VALUES), 1), _HASH_VALUES - 1)
