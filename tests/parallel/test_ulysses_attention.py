"""Ulysses attention equals attention of one process, gradients included."""

import pytest
import torch
import torch.distributed as distributed

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.parallel.context_parallel import Ulysses
from moesaic.parallel.ulysses_attention import UlyssesAttention
from parallel.attention_cases import CASES, Outcome, attend_locally, attend_on_rank


def _all_cases(ranks: int) -> dict[str, Outcome]:
    rank, group = distributed.get_rank(), distributed.group.WORLD
    fits = {
        name: c for name, c in CASES.items() if not Ulysses().problems(heads=c.heads, ranks=ranks)
    }
    return {
        name: attend_on_rank(
            case, backend=UlyssesAttention(group, kv_heads=case.kv_heads), rank=rank, ranks=ranks
        )
        for name, case in fits.items()
    }


@pytest.mark.parametrize("ranks", [1, 3, 4])  # two: the law of context-parallel ranks
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    results = run_on_ranks(ranks, _all_cases, ranks)
    assert len(results[0]) == len(CASES)
    for name in results[0]:
        for expected, *parts in zip(
            attend_locally(CASES[name]), *(s[name] for s in results), strict=True
        ):
            torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_more_ranks_than_heads_are_refused_with_the_way_out() -> None:
    assert Ulysses().problems(heads=4, ranks=4) is None
    assert "at most 2 context ranks, or Ring" in str(Ulysses().problems(heads=2, ranks=4))
