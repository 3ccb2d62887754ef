"""Random state: one stream per rank, saved and restored, unchanged by validation."""

import torch

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.train.random_state import (
    preserve_random_state,
    random_state,
    restore_random_state,
    seed_rank,
)


def test_a_generator_continues_from_its_state() -> None:
    seed_rank(3, world=SingleProcess())
    state = random_state(SingleProcess())
    expected = torch.rand(4)
    torch.manual_seed(99)
    restore_random_state(state, world=SingleProcess(), seed=3, step=7)
    assert torch.equal(torch.rand(4), expected)


def _first_number() -> float:
    seed_rank(3, world=ProcessGroupWorld())
    return float(torch.rand(()))


def test_ranks_have_different_random_streams() -> None:
    assert len(set(run_on_ranks(4, _first_number))) == 4


def test_another_number_of_ranks_starts_new_streams() -> None:
    seed_rank(3, world=SingleProcess())
    two = {"0/cpu": torch.get_rng_state(), "1/cpu": torch.get_rng_state()}
    restore_random_state(two, world=SingleProcess(), seed=3, step=7)
    here = torch.rand(4)
    restore_random_state(two, world=SingleProcess(), seed=3, step=8)
    assert not torch.equal(torch.rand(4), here)


def test_preserve_random_state_restores_the_generators() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with preserve_random_state(torch.device("cpu")):
        torch.rand(100)
    assert torch.equal(torch.rand(2), expected)
