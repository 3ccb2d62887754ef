import numpy as np
import pytest

from moesaic.monitor.specialization import (
    characteristic_inputs,
    conditional_entropy,
    shuffle_counts,
)


def test_conditional_entropy_is_0_when_x_determines_the_expert_and_1_when_it_is_independent():
    assert conditional_entropy(np.diag([5, 1, 9, 2])) == 0
    assert conditional_entropy(np.full((4, 3), 7)) == pytest.approx(1)
    assert conditional_entropy(np.zeros((4, 3))) == 0
    assert conditional_entropy(np.array([[3, 4]])) == 0


def test_uncertainty_weighs_each_x_by_its_edges():
    counts = np.array([[30, 5], [0, 5]])  # 30 edges known for certain, 10 not at all
    assert conditional_entropy(counts) == pytest.approx(10 / 40)


def test_shuffling_keeps_both_sums_and_nothing_else():
    counts = np.diag([400, 300, 200, 100])
    dealt = shuffle_counts(counts)
    assert dealt.sum(0).tolist() == counts.sum(0).tolist()
    assert dealt.sum(1).tolist() == counts.sum(1).tolist()
    chance = -sum(p * np.log2(p) for p in (0.4, 0.3, 0.2, 0.1)) / 2
    assert conditional_entropy(dealt) == pytest.approx(chance, abs=0.02)
    assert (shuffle_counts(counts) == dealt).all()


def test_ids_that_occur_once_have_no_entropy_even_when_shuffled():
    counts = np.zeros((2, 50), dtype=np.int64)
    counts[np.arange(50) % 2, np.arange(50)] = 1
    assert conditional_entropy(counts) == conditional_entropy(shuffle_counts(counts)) == 0


def test_the_typical_ids_of_an_expert_are_its_own_and_not_the_frequent_or_the_rare():
    counts = np.array([
        [500, 90, 5, 3, 40],
        [500, 10, 95, 0, 41],
    ])  # fmt: skip
    assert characteristic_inputs(counts)[0][0] == 1
    assert characteristic_inputs(counts)[1][0] == 2
    assert 3 not in characteristic_inputs(counts)[0]
