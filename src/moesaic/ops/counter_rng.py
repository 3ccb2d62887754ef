"""Counter-based random numbers on any device: each is a pure function of its key. Dropout by key.

What is drawn for a token does not depend on the rank that computes it, on the order of work, or on
recomputation. The hash is SplitMix64's finalizer (doi:10.1145/2660193.2660195), as in
``data/numpy_counter_rng.py``; int64 arithmetic wraps, so it is arithmetic modulo 2^64.

In dropout four channels share a hash: each uses 16 of its 64 bits. So the rate is a multiple of
2**-16, and the values that remain are scaled by exactly that rate: the mean is unchanged.

Letters: N any shape, T tokens, D channels.
"""

import torch

from moesaic.core.shapes import Bool, Float, Int, Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MULTIPLIER_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = -7723592293110705685  # 0x94D049BB133111EB
_CHANNELS_PER_HASH, _HASH_VALUES = 4, 2**16


def hash_combine(key: Int[Tensor, "*N"], other: Tensor | int) -> Int[Tensor, "*N"]:
    """Return 64 bits (int64) that depend on both arguments; they broadcast."""
    state = (key ^ other).add_(_GOLDEN)
    state.bitwise_xor_(_logical_shift_right(state, 30)).mul_(_MULTIPLIER_1)
    state.bitwise_xor_(_logical_shift_right(state, 27)).mul_(_MULTIPLIER_2)
    return state.bitwise_xor_(_logical_shift_right(state, 31))


def bits_to_uniform(bits: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return a float32 in [0, 1) for each hash."""
    return _logical_shift_right(bits, 40).float() * 2.0**-24


def bits_to_normal(radius: Int[Tensor, "*N"], angle: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return a standard normal float32 for each pair of hashes (Box and Muller 1958)."""
    one = 1 - bits_to_uniform(radius)  # never zero
    return (-2 * one.log()).sqrt() * (2 * torch.pi * bits_to_uniform(angle)).cos()


def hash_to_uniform(bits: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return a float64 in [0, 1) for each hash: its upper 53 bits, exact on every device."""
    return _logical_shift_right(bits, 11).double().mul_(2.0**-53)


def hash_to_normal(bits: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return a standard normal float64 for each hash (Box and Muller 1958), at most 6.7 in size.

    The logarithm and the cosine of two devices differ in the last bits of a float64, so that their
    values rounded to float32 are equal but for about one in 10^8.
    """
    radius = _logical_shift_right(bits, 32).double().add_(1).mul_(2.0**-32)  # never zero
    angle = bits.bitwise_and(2**32 - 1).double().mul_(2.0**-31 * torch.pi)
    return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_())


def hash_name(text: str) -> int:
    """Return the FNV-1a hash of a name as int64, the same in every process."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value - 2**64 if value >= 2**63 else value


def _logical_shift_right(bits: Tensor, places: int) -> Tensor:
    """Shift right and fill with zeros (``>>`` of int64 fills with the sign)."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def dropout(x: Float[Tensor, "T D"], *, key: Int[Tensor, "T"], rate: float) -> Float[Tensor, "T D"]:
    """Set channels to zero with probability ``rate`` in (0, 1), and scale the others.

    Backward saves one byte per channel, which is cheaper to read than to hash again.
    """
    scale = _HASH_VALUES / (_HASH_VALUES - _drop_threshold(rate))
    return (x * scale).masked_fill(dropout_mask(x, key=key, rate=rate), 0.0)


def dropout_mask(
    x: Float[Tensor, "T D"], *, key: Int[Tensor, "T"], rate: float
) -> Bool[Tensor, "T D"]:
    """Return True for the channels of ``x`` that are set to zero."""
    width = x.shape[-1]
    column = x.new_empty(-(-width // _CHANNELS_PER_HASH), dtype=torch.long)  # fake if x is
    torch.arange(len(column), out=column)
    values = hash_combine(key[:, None], column).view(torch.int16)
    return values[:, :width] < _drop_threshold(rate) - _HASH_VALUES // 2


def _drop_threshold(rate: float) -> int:
    return min(max(round(rate * _HASH_VALUES), 1), _HASH_VALUES - 1)
