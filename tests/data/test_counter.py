"""Counter-based numbers: uniform, unrelated over keys, and fixed for all time."""

import numpy as np

from moesaic.data.numpy_counter_rng import random_bits, random_uniform


def test_numbers_are_uniform_over_any_key():
    for numbers in (random_uniform(1, np.arange(100_000)), random_uniform(np.arange(100_000), 1)):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square, 19 degrees, p = 0.0007
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_the_order_of_keys_matters_and_no_bits_are_lost():
    assert random_bits(1, 2) != random_bits(2, 1)
    assert len(np.unique(random_bits(7, np.arange(100_000)))) == 100_000


def test_numbers_are_the_same_on_every_machine():
    # a checkpoint names its place in the data by these: they may never change
    assert random_bits(0).item() == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
    assert random_bits(1, 2, 3).item() == 15020427595393229491
