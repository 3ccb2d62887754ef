"""Stochastic rounding keeps the mean, and its bits are those of a value's place."""

import torch

from moesaic.ops.stochastic_rounding import ShardPosition, round_stochastically, rounding_key
from moesaic.optim.master_weights import ShardUpdate, StochasticRounding

KEY = rounding_key("experts.up", seed=1, step=3)


def test_values_go_to_a_neighbour_with_their_mean_and_exact_ones_stay():
    lower, upper = 1.0, 1.0 + 2.0**-7
    values = torch.full((64, 501), lower + 0.3 * (upper - lower))
    rounded = round_stochastically(values, key=KEY, position=ShardPosition.of_whole(values.shape))
    assert rounded.dtype == torch.bfloat16
    assert set(rounded.float().unique().tolist()) == {lower, upper}
    share = (rounded.float() == upper).double().mean()
    assert abs(share - 0.3) < 0.01  # 4 standard deviations of 32,064 draws
    exact = torch.tensor([0.0, -1.5, 2.0**100, torch.inf, -torch.inf])
    position = ShardPosition.of_whole(exact.shape)
    assert torch.equal(round_stochastically(exact, key=KEY, position=position).float(), exact)
    below = round_stochastically(-values, key=KEY, position=ShardPosition.of_whole(values.shape))
    assert torch.equal(below, -rounded)


def test_a_shard_is_rounded_as_its_part_of_the_whole():
    whole = torch.randn(5, 6, 23, generator=torch.Generator().manual_seed(0))
    rounded = round_stochastically(whole, key=KEY, position=ShardPosition.of_whole(whole.shape))
    columns = ((1, 6), (13, 5), (22, 1))
    shard = torch.cat([whole[2:4, 1:5, s : s + n] for s, n in columns], 2)
    position = ShardPosition((((2, 2),), ((1, 4),), columns), whole.shape)
    want = torch.cat([rounded[2:4, 1:5, s : s + n] for s, n in columns], 2)
    assert torch.equal(round_stochastically(shard, key=KEY, position=position), want)


def test_another_step_or_name_draws_other_bits():
    values = torch.full((1000,), 1.003)
    position = ShardPosition.of_whole(values.shape)
    keys = [KEY, rounding_key("experts.up", seed=1, step=4), rounding_key("w", seed=1, step=3)]
    first, *others = (round_stochastically(values, key=k, position=position) for k in keys)
    assert not any(torch.equal(first, other) for other in others)


def test_an_optimizer_rounds_by_seed_name_step_and_place():
    values = torch.rand(8, 64)

    def rounded(seed: int, name: str, step: int, first: int = 0) -> torch.Tensor:
        position = ShardPosition.of_whole(values.shape).rows(first, None)
        parameter = torch.empty(8 - first, 64, dtype=torch.bfloat16)
        update = ShardUpdate(name, step, position)
        StochasticRounding(seed=seed).write_back(parameter, values[first:], update=update)
        return parameter

    whole = rounded(0, "up", 1)
    assert torch.equal(rounded(0, "up", 1, first=3), whole[3:])
    for other in (rounded(1, "up", 1), rounded(0, "down", 1), rounded(0, "up", 2)):
        assert not torch.equal(other, whole)
