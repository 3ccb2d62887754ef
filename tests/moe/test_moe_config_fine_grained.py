"""Fine-grained and shared experts keep the total and active parameters."""

import pytest

from model.samples import BASE
from moesaic.core.errors import ConfigError
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.moe.config import MoE, fine_grained
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.moe.shared_experts import NoSharedExperts

HIDDEN = BASE.feed_forward.hidden
COARSE = {
    "switch": MoE(experts=4, select=SwitchTop1()),
    "top2": MoE(experts=8, select=TopK(k=2)),
}


def _experts(moe):
    """Parameters of the experts, shared ones included: all, and those that a token uses."""
    entries = [e for e in count_parameters(BASE.replace(moe=moe)).entries if "experts" in e.part]
    return sum(e.size for e in entries), round(sum(e.size * e.active_fraction for e in entries))


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("coarse", COARSE)
def test_total_and_active_parameters_of_the_experts_stay(coarse, parts, shared):
    moe = COARSE[coarse]
    if shared >= parts * moe.select.experts_per_token(moe.experts):
        with pytest.raises(ConfigError, match=f"shared={shared}"):
            fine_grained(moe, hidden=HIDDEN, splits=parts, shared=shared)
        return
    fine = fine_grained(moe, hidden=HIDDEN, splits=parts, shared=shared)
    assert fine.experts == parts * moe.experts - shared
    assert _experts(fine) == _experts(moe)


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="splits=5"):
        fine_grained(COARSE["top2"], hidden=HIDDEN, splits=5)


def test_chosen_experts_are_weighted_by_their_plain_probabilities():
    fine = fine_grained(COARSE["top2"], hidden=HIDDEN, splits=4, shared=1)
    assert fine.select == TopK(k=7, normalise="none")
    assert isinstance(
        fine_grained(COARSE["top2"], hidden=HIDDEN, splits=4).shared_experts, NoSharedExperts
    )
