"""Every rule that has a file of its own is a word in configs without being imported by hand."""

import pytest

from moesaic.core.config import Choice
from moesaic.moe import builtin_rules
from moesaic.moe.attention_experts import AttentionExperts
from moesaic.moe.balance import Balance
from moesaic.moe.config import SparseLayer
from moesaic.moe.dispatch_projection import DispatchProjection
from moesaic.moe.experts import Expert
from moesaic.moe.router_logits import CrossLayerRouting, RouterInput
from moesaic.moe.router_noise import RouterNoise
from moesaic.moe.select import ExpertGroups, Select
from moesaic.moe.select_dynamic import InferenceSelect
from moesaic.moe.shared_experts import SharedExpertBranch

FAMILIES: dict[str, type[Choice]] = {
    "EXPERT_GROUPS": ExpertGroups,
    "ATTENTION_EXPERTS": AttentionExperts,
    "BALANCES": Balance,
    "SHARED_EXPERT_BRANCHES": SharedExpertBranch,
    "ROUTER_INPUTS": RouterInput,
    "DISPATCH_PROJECTIONS": DispatchProjection,
    "EXPERTS": Expert,
    "INFERENCES": InferenceSelect,
    "CROSS_LAYER_ROUTINGS": CrossLayerRouting,
    "NOISES": RouterNoise,
    "SELECTS": Select,
    "SPARSE_LAYERS": SparseLayer,
}
OWN_FILES = tuple(
    f"moesaic.moe.{room}."
    for room in ("balances", "bodies", "conditions", "links", "noises", "selects")
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_list_of_a_family_leaves_no_file_out(name):
    listed, family = vars(builtin_rules)[name], FAMILIES[name]
    assert all(issubclass(member, family) for member in listed)
    own = {c for c in family.members.values() if c.__module__.startswith(OWN_FILES)}
    assert own <= set(listed)
