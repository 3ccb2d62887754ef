"""Random numbers by counter: the same as the data pipeline's, and even."""

import numpy as np
import torch

from moesaic.data import numpy_counter_rng as counter_rng
from moesaic.ops.counter_rng import bits_to_uniform, hash_combine, hash_name


def test_the_hash_is_that_of_the_data_pipeline():
    first, second = (torch.randint(2**62, (100,)) for _ in range(2))
    chained = counter_rng.random_bits(first.numpy(), second.numpy()).view(np.int64)
    start = torch.zeros(100, dtype=torch.long)
    assert hash_combine(hash_combine(start, first), second).tolist() == chained.tolist()


def test_numbers_are_uniform_and_neighbouring_keys_are_unrelated():
    draws = bits_to_uniform(hash_combine(torch.arange(100_000), 7))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=10, min=0, max=1) / 10_000
    torch.testing.assert_close(counts, torch.ones(10), rtol=0, atol=0.05)
    pairs = torch.stack([draws[:-1], draws[1:]])
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.02


def test_names_have_different_hashes():
    names = [f"{side}.{layer}" for side in ("encoder", "decoder") for layer in range(100)]
    assert len({hash_name(name) for name in names}) == len(names)
    assert all(-(2**63) <= hash_name(name) < 2**63 for name in names)
