"""Recall at 1 and the best-of-n curve, against counting."""

from itertools import combinations

import pytest
import torch

from moesaic.evaluate.ranking_metrics import best_of_n_curve, recall_at_1


def test_recall_is_the_share_of_queries_nearest_to_their_own_candidate():
    queries = torch.eye(4)
    candidates = queries[[0, 1, 3, 2]] * 5
    assert recall_at_1(queries, candidates=candidates) == 0.5
    assert recall_at_1(queries, candidates=torch.ones(4, 4)) == 0  # a tie is a miss


def test_the_best_of_n_curve_equals_the_mean_over_all_sets_of_n():
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 3, 6, generator=generator)
    for n in (1, 2, 4, 6):
        found = [
            gold[p, max(chosen, key=lambda c: float(proxy[p, c]))]
            for p in range(3)
            for chosen in combinations(range(6), n)
        ]
        assert best_of_n_curve(proxy, gold=gold, counts=[n])[0] == pytest.approx(
            float(torch.stack(found).mean()), abs=1e-6
        )


def test_a_count_above_the_candidates_is_refused():
    with pytest.raises(ValueError, match="n=7"):
        best_of_n_curve(torch.zeros(1, 6), gold=torch.zeros(1, 6), counts=[7])
