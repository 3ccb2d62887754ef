"""Random numbers by counter on any device: each is a pure function of its key.

So what is drawn for a token does not depend on the rank that holds it, on the order of work, or on
how often a pass is repeated. The mixer is SplitMix64's finaliser (doi:10.1145/2660193.2660195), as
in ``data/numpy_counter_rng.py``; int64 arithmetic wraps, which is arithmetic modulo 2^64.

Letters: N any shape.

Drop: which channels of a token dropout sets to zero, as a function of the token's key.

Four channels share a hash: each looks at 16 of its 64 bits. So the rate is a multiple of 2**-16,
and what is kept is scaled by exactly that: nothing is lost on average.

Letters: T tokens, D channels.
"""

import torch

from moesaic.core.shapes import Bool, Float, Int, Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


_MULTIPLIER_1, _MULTIPLIER_2 = (
    -4658895280553007687,
    -7723592293110705685,
)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash_combine(key: Int[Tensor, "*N"], other: Tensor | int) -> Int[Tensor, "*N"]:
    """Return 64 bits (int64) that depend on both arguments; they broadcast."""
    state = (key ^ other).add_(_GOLDEN)
    state.bitwise_xor_(_logical_shift_right(state, 30)).mul_(_MULTIPLIER_1)
    state.bitwise_xor_(_logical_shift_right(state, 27)).mul_(_MULTIPLIER_2)
    return state.bitwise_xor_(_logical_shift_right(state, 31))


def bits_to_uniform(bits: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return a float32 in [0, 1) for each of some mixed bits."""
    return _logical_shift_right(bits, 40).float() * 2.0**-24


def hash_name(text: str) -> int:
    """Return an int64 for a name: FNV-1a, the same in every process."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value - 2**64 if value >= 2**63 else value


def _logical_shift_right(bits: Tensor, places: int) -> Tensor:
    """Shift right, zeros coming in (int64's own shift brings in the sign)."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


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


def reference_dropout_mask(
    key: Int[Tensor, "T"], *, width: int, rate: float
) -> Bool[Tensor, "T D"]:
    """The definition of ``dropped``, one channel at a time."""
    lost = torch.zeros(len(key), width, dtype=torch.bool, device=key.device)
    for channel in range(width):
        bits = hash_combine(key, torch.full_like(key, channel // _CHANNELS_PER_HASH)) >> 16 * (
            channel % _CHANNELS_PER_HASH
        )
        lost[:, channel] = (bits + _HASH_VALUES // 2) % _HASH_VALUES < _drop_threshold(rate)
    return lost


def _drop_threshold(rate: float) -> int:
    return min(max(round(rate * _HASH_VALUES), 1), _HASH_VALUES - 1)
