"""Drop: which channels of a token dropout sets to zero, as a function of the token's key.

Four channels share a hash: each looks at 16 of its 64 bits. So the rate is a multiple of 2**-16,
and what is kept is scaled by exactly that: nothing is lost on average.

Letters: T tokens, D channels.
"""

import torch

from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.ops.random import mix

_LANES, _VALUES = 4, 2**16


def drop(x: Float[Tensor, "T D"], *, key: Int[Tensor, "T"], rate: float) -> Float[Tensor, "T D"]:
    """Set channels to zero with probability ``rate`` in (0, 1), and scale the others.

    Backward keeps one byte per channel: hashing again would cost more than reading it.
    """
    scale = _VALUES / (_VALUES - _lost(rate))
    return (x * scale).masked_fill(dropped(key, width=x.shape[-1], rate=rate), 0.0)


def dropped(key: Int[Tensor, "T"], *, width: int, rate: float) -> Bool[Tensor, "T D"]:
    """Return which channels are lost."""
    column = torch.arange(-(-width // _LANES), device=key.device)
    values = mix(key[:, None], column).view(torch.int16)
    return values[:, :width] < _lost(rate) - _VALUES // 2


def plain_dropped(key: Int[Tensor, "T"], *, width: int, rate: float) -> Bool[Tensor, "T D"]:
    """The definition of ``dropped``, one channel at a time."""
    lost = torch.zeros(len(key), width, dtype=torch.bool, device=key.device)
    for channel in range(width):
        bits = mix(key, torch.full_like(key, channel // _LANES)) >> 16 * (channel % _LANES)
        lost[:, channel] = (bits + _VALUES // 2) % _VALUES < _lost(rate)
    return lost


def _lost(rate: float) -> int:
    return min(max(round(rate * _VALUES), 1), _VALUES - 1)
