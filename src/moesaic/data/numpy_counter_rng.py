"""Counter-based random numbers and permutations in NumPy: pure functions of their keys.

Results do not depend on the order of calls, nor on ranks. The mixing function is SplitMix64's
finaliser (Steele et al. 2014, doi:10.1145/2660193.2660195), chained over the keys; all arithmetic
is modulo 2^64.

Permutations need no table: a balanced Feistel network permutes ``range(4^h)`` for the smallest
``4^h >= size``, and is applied again to values outside of ``range(size)`` (cycle walking; Black and
Rogaway 2002, doi:10.1007/3-540-45760-7_9).
"""

from typing import Any, TypeAlias

import numpy as np

UInt64Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
GOLDEN_RATIO_64 = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = (np.uint64(n) for n in (30, 27, 31, 11))
FEISTEL_ROUNDS = 4


def random_bits(*keys: Any) -> UInt64Array:
    """Return 64 random bits per element of the broadcast ``keys`` (non-negative integers)."""
    state = np.asarray(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + GOLDEN_RATIO_64
            state = (state ^ (state >> _S30)) * _M1
            state = (state ^ (state >> _S27)) * _M2
            state = state ^ (state >> _S31)
    return state


def random_uniform(*keys: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a float64 in [0, 1) per element of the broadcast ``keys``."""
    return (random_bits(*keys) >> _S11).astype(np.float64) * 2.0**-53


def random_permutation(index: Any, *, size: Any, key: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the image of each ``index`` under the permutation of ``range(size)`` for its ``key``.

    All three broadcast; ``0 <= index < size``; permutations of two keys are independent.
    """
    arrays = np.broadcast_arrays(index, size, key)
    shape = arrays[0].shape
    index, size, key = (np.ravel(x).astype(np.uint64) for x in arrays)
    half = _half_bits(size)
    out = _feistel(index, half=half, key=key)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], half=half[outside], key=key[outside])
        outside = outside[out[outside] >= size[outside]]
    return out.astype(np.int64).reshape(shape)


def _half_bits(size: UInt64Array) -> UInt64Array:
    # frexp of size-1 is its bit length, exact below 2^53
    bits = np.frexp(np.maximum(size, 1).astype(np.float64) - 1)[1]
    return np.maximum((bits + 1) // 2, 1).astype(np.uint64)


def _feistel(value: UInt64Array, *, half: UInt64Array, key: UInt64Array) -> UInt64Array:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for step in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (random_bits(key, step, right) & mask)
    return (left << half) | right
