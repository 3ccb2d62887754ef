import numpy as np
import pytest

from moesaic.observe.insight import dealt_anew, typical, uncertainty


def test_uncertainty_is_nothing_when_x_decides_and_all_when_it_says_nothing():
    assert uncertainty(np.diag([5, 1, 9, 2])) == 0
    assert uncertainty(np.full((4, 3), 7)) == pytest.approx(1)
    assert uncertainty(np.zeros((4, 3))) == 0
    assert uncertainty(np.array([[3, 4]])) == 0


def test_uncertainty_weighs_each_x_by_its_edges():
    counts = np.array([[30, 5], [0, 5]])  # 30 edges known for certain, 10 not at all
    assert uncertainty(counts) == pytest.approx(10 / 40)


def test_dealing_anew_keeps_both_sums_and_forgets_the_rest():
    counts = np.diag([400, 300, 200, 100])
    dealt = dealt_anew(counts)
    assert dealt.sum(0).tolist() == counts.sum(0).tolist()
    assert dealt.sum(1).tolist() == counts.sum(1).tolist()
    chance = -sum(p * np.log2(p) for p in (0.4, 0.3, 0.2, 0.1)) / 2
    assert uncertainty(dealt) == pytest.approx(chance, abs=0.02)
    assert (dealt_anew(counts) == dealt).all()


def test_ids_seen_once_look_certain_however_they_are_dealt():
    counts = np.zeros((2, 50), dtype=np.int64)
    counts[np.arange(50) % 2, np.arange(50)] = 1
    assert uncertainty(counts) == uncertainty(dealt_anew(counts)) == 0


def test_the_typical_ids_of_an_expert_are_its_own_and_not_the_frequent_or_the_rare():
    counts = np.array([
        [500, 90, 5, 3, 40],
        [500, 10, 95, 0, 41],
    ])  # fmt: skip
    assert typical(counts)[0][0] == 1
    assert typical(counts)[1][0] == 2
    assert 3 not in typical(counts)[0]
