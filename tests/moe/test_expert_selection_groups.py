"""Group-limited routing equals its papers' definitions."""

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.moe.expert_selection import AllExperts, SigmoidTopK, TopGroups, TopK
from moesaic.moe.router_context import RouterContext

SCORES = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.6, 0.3, 0.1, 0.2]])  # groups of two: .9 1. .9 .3


def test_a_group_score_is_the_sum_of_its_two_best():
    open_ = TopGroups(num_groups=4, top_groups=1)(SCORES).isfinite()
    assert open_.tolist() == [[False, False, True, True, False, False, False, False]]


def test_a_group_score_with_one_expert_is_the_maximum():
    open_ = TopGroups(num_groups=4, top_groups=2, experts_per_score=1)(SCORES).isfinite()
    assert open_.tolist() == [[True, True, False, False, True, True, False, False]]


def test_scores_of_kept_groups_are_left_as_they_are():
    kept = TopGroups(num_groups=2, top_groups=1)(SCORES)
    assert torch.equal(kept[:, :4], SCORES[:, :4])
    assert torch.equal(AllExperts()(SCORES), SCORES)
    assert torch.equal(TopGroups(num_groups=2, top_groups=2)(SCORES), SCORES)


@pytest.mark.parametrize("rule", [TopK, SigmoidTopK])
def test_a_token_selects_from_its_top_groups_only(rule):
    logits = torch.randn(200, 12)
    routing = rule(k=4, expert_groups=TopGroups(num_groups=4, top_groups=2))(
        RouterContext.from_logits(logits)
    )
    groups = routing.expert.view(200, 4) // 3
    assert max(len(set(row)) for row in groups.tolist()) == 2
    free = rule(k=4)(RouterContext.from_logits(logits)).expert.view(200, 4) // 3
    assert max(len(set(row)) for row in free.tolist()) > 2


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="at most num_groups=2"):
        TopGroups(num_groups=2, top_groups=3)
    narrow = SigmoidTopK(k=4, expert_groups=TopGroups(num_groups=4, top_groups=1))
    assert "num_groups=4 divides" in narrow.problems(10, 0)
    assert "at most 2" in narrow.problems(8, 0)
    assert narrow.problems(16, 0) is None
