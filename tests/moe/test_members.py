"""Every rule that has a file of its own is a word in configs without being imported by hand."""

import pytest

from moesaic.moe import members
from moesaic.moe.around import Beside, Exchange
from moesaic.moe.attention import AttentionExperts
from moesaic.moe.config import Sparse
from moesaic.moe.experts import Expert

FAMILIES = {
    "SPARSE": Sparse,
    "EXPERTS": Expert,
    "BESIDES": Beside,
    "EXCHANGES": Exchange,
    "ATTENTION": AttentionExperts,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_list_of_a_family_leaves_no_file_out(name):
    listed, family = vars(members)[name], FAMILIES[name]
    assert all(issubclass(member, family) for member in listed)
    own = {c for c in family.members.values() if c.__module__.startswith("moesaic.moe.bodies")}
    assert own <= set(listed)
