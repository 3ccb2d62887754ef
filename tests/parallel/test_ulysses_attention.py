"""Looking with a few heads at all tokens finds what all heads find."""

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.parallel.context_parallel import Ulysses
from moesaic.parallel.ulysses_attention import UlyssesAttention
from parallel.attention_cases import CASES, Outcome, look_as, look_here


def _everything(ranks: int) -> dict[str, Outcome]:
    rank, group = distributed.get_rank(), distributed.group.WORLD
    fits = {
        name: c for name, c in CASES.items() if not Ulysses().problems(heads=c.heads, ranks=ranks)
    }
    return {
        name: look_as(
            case, looking=UlyssesAttention(group, kv_heads=case.groups), rank=rank, ranks=ranks
        )
        for name, case in fits.items()
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_find_and_learn_what_one_would(ranks: int) -> None:
    seen = run_on_ranks(ranks, _everything, ranks)
    assert len(seen[0]) == len(CASES)
    for name in seen[0]:
        for whole, *parts in zip(look_here(CASES[name]), *(s[name] for s in seen), strict=True):
            torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5, msg=name)


def test_more_ranks_than_heads_are_refused_with_the_way_out() -> None:
    assert Ulysses().problems(heads=4, ranks=4) is None
    assert "at most 2 context ranks, or Ring" in str(Ulysses().problems(heads=2, ranks=4))
