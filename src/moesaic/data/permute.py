"""A pseudo-random permutation of ``range(size)`` without a table: a Feistel network, cycle-walked.

A balanced Feistel network permutes ``range(4^h)`` for the smallest ``4^h >= size``; a value that
lands outside is sent through again until it is inside, which keeps it a permutation
(format-preserving encryption; Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9).
"""

from typing import Any

import numpy as np

from moesaic.data.counter import UInt64Array, random_bits

FEISTEL_ROUNDS = 4


def random_permutation(index: Any, *, size: Any, key: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where each ``index`` goes in its own permutation of ``range(size)``.

    All three broadcast; ``0 <= index < size``; two keys give two unrelated permutations.
    """
    whole = np.broadcast_arrays(index, size, key)
    shape = whole[0].shape
    index, size, key = (np.ravel(x).astype(np.uint64) for x in whole)
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
    for turn in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (random_bits(key, turn, right) & mask)
    return (left << half) | right
