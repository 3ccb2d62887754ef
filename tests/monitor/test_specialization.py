import numpy as np
import pytest

from moesaic.monitor.specialization import (
    expert_share_by_language,
    measure_specialization,
    routing_distance,
)


def test_one_expert_per_language_carries_all_the_information_there_is():
    found = measure_specialization(np.diag([5, 500, 50, 7]))
    assert found.mutual_information == pytest.approx(
        2.0
    )  # log2 of 4 languages, however many tokens
    assert found.load_entropy == pytest.approx(1.0)
    assert found.language_entropy == pytest.approx(0.0)
    assert found.top_languages[2][0] == (2, pytest.approx(4.0))


def test_routing_that_ignores_the_language_carries_none():
    found = measure_specialization(np.outer([1, 2, 3], [10, 20, 30]))
    assert found.mutual_information == pytest.approx(0.0)
    assert all(ratio == pytest.approx(1.0) for _, ratio in found.top_languages[0])


def test_a_collapsed_layer_has_no_entropy():
    found = measure_specialization(np.array([[9, 9], [0, 0]]))
    assert found.load_entropy == pytest.approx(0.0)
    assert found.top_languages[1] == ()


def test_languages_without_tokens_are_left_out():
    counts = np.array([[4, 0, 0], [0, 0, 4]])
    assert measure_specialization(counts).mutual_information == pytest.approx(1.0)
    assert np.isfinite(routing_distance(counts[None])).all()
    assert measure_specialization(np.zeros((2, 3))).mutual_information == 0
    assert expert_share_by_language(counts)[:, 1].sum() == 0


def test_distance_is_a_metric_from_equal_to_disjoint():
    random = np.random.default_rng(0)
    counts = random.integers(0, 50, (3, 8, 6))
    found = routing_distance(counts)
    assert (np.diag(found) == 0).all()
    assert found == pytest.approx(found.T)
    for a, b, c in np.ndindex(6, 6, 6):
        assert found[a, c] <= found[a, b] + found[b, c] + 1e-9
    assert routing_distance(np.array([[[5, 0], [0, 5]]]))[0, 1] == pytest.approx(1.0)
    assert routing_distance(np.array([[[5, 50], [1, 10]]]))[0, 1] == pytest.approx(0.0, abs=1e-7)
