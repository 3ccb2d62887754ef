"""Random numbers by counter: each is a pure function of its keys; order and ranks never matter.

The mixer is SplitMix64's finaliser (Steele et al. 2014, doi:10.1145/2660193.2660195), chained over
the keys; all arithmetic is modulo 2^64.
"""

from typing import Any, TypeAlias

import numpy as np

UInt64Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]

GOLDEN_RATIO_64 = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = (np.uint64(n) for n in (30, 27, 31, 11))


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
