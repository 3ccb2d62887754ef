"""Counter-based random numbers and permutations: uniform, independent over keys, and fixed."""

import numpy as np
import pytest

from moesaic.data.numpy_counter_rng import random_bits, random_permutation, random_uniform


def test_numbers_are_uniform_over_any_key():
    for numbers in (random_uniform(1, np.arange(100_000)), random_uniform(np.arange(100_000), 1)):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square, 19 degrees, p = 0.0007
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_the_order_of_keys_matters_and_bits_do_not_collide():
    assert random_bits(1, 2) != random_bits(2, 1)
    assert len(np.unique(random_bits(7, np.arange(100_000)))) == 100_000


def test_numbers_are_the_same_on_every_machine():
    # a checkpoint names its place in the data by these: they may never change
    assert random_bits(0).item() == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
    assert random_bits(1, 2, 3).item() == 15020427595393229491


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


def test_neighbours_are_separated():
    found = random_permutation(np.arange(5000), size=5000, key=4)
    assert abs(np.corrcoef(np.arange(5000), found)[0, 1]) < 0.05
    assert (np.abs(np.diff(found)) < 10).mean() < 0.02
