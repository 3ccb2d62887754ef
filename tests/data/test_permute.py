"""Permutations: broadcast like arrays, look random, and work at the sizes of real corpora."""

import numpy as np
import pytest

from moesaic.data.numpy_counter_rng import random_permutation


def test_every_element_has_its_own_size_and_key():
    index, size, key = np.array([3, 3, 0]), np.array([10, 1000, 1]), np.array([1, 2, 3])
    together = random_permutation(index, size=size, key=key)
    alone = [
        int(random_permutation(*i[:1], size=i[1], key=i[2]))
        for i in zip(index, size, key, strict=True)
    ]
    assert together.tolist() == alone
    assert (together < size).all()


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1, 12_000_000])
def test_large_sizes_stay_inside_and_distinct(size):
    found = random_permutation(np.arange(50_000), size=size, key=9)
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found)) == 50_000


def test_neighbours_do_not_stay_together():
    found = random_permutation(np.arange(5000), size=5000, key=4)
    assert abs(np.corrcoef(np.arange(5000), found)[0, 1]) < 0.05
    assert (np.abs(np.diff(found)) < 10).mean() < 0.02
