"""Product keys find the slots of highest scores."""

import pytest
import torch

from moesaic.moe.product_key_memory import ProductKeys, leading_singular_vectors, unit_rms

DIM, SIDE, KEY = 12, 7, 6


def _keys(*, read, rank=2):
    keys = ProductKeys(dim=DIM, keys_per_side=SIDE, num_slots_read=read, rank=rank, key_dim=KEY)
    for name, parameter in keys.named_parameters():
        torch.nn.init.normal_(parameter, std=keys.initializers()[name].std or 0.3)
    return keys


def _grid(keys, x):
    """Scores of all slots, by the formula."""
    query = unit_rms(keys.query(x).view(len(x), 2, keys.rank, KEY))
    row = torch.einsum("trd,nd->trn", query[:, 0], unit_rms(keys.row)) / KEY**0.5
    column = torch.einsum("trd,nd->trn", query[:, 1], unit_rms(keys.column)) / KEY**0.5
    return torch.einsum("tri,rs,tsj->tij", row, keys.core, column)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scores_are_rows_times_core_times_columns(rank):
    keys, x = _keys(read=SIDE * SIDE, rank=rank), torch.randn(5, DIM)
    found = keys(x)
    grid = _grid(keys, x).flatten(1)
    torch.testing.assert_close(found.score, grid.gather(1, found.slot))
    assert all(row.unique().numel() == SIDE * SIDE for row in found.slot)


@pytest.mark.parametrize("read", [7, 12])
def test_reading_as_many_as_a_side_has_finds_the_best_of_all_slots(read):
    keys, x = _keys(read=read), torch.randn(6, DIM)
    found = keys(x)
    best = _grid(keys, x).flatten(1).topk(read)
    torch.testing.assert_close(found.score, best.values)
    assert torch.equal(found.slot, best.indices)


def test_few_slots_are_the_best_of_the_best_rows_and_columns():
    keys, x = _keys(read=3), torch.randn(6, DIM)
    found = keys(x)
    grid = _grid(keys, x)
    assert (found.score[:, :-1] >= found.score[:, 1:]).all()
    share = found.score.sum() / grid.flatten(1).topk(3).values.sum()
    assert 0.7 < share <= 1  # a search by rows and columns is not exact; it is close


def test_the_core_and_all_keys_get_a_gradient():
    keys, x = _keys(read=4), torch.randn(20, DIM)
    keys(x).score.square().sum().backward()
    for name, parameter in keys.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_the_core_starts_as_one_number_everywhere():
    keys = ProductKeys(dim=DIM, keys_per_side=SIDE, num_slots_read=3, rank=2, key_dim=KEY)
    torch.nn.init.zeros_(keys.core_change)
    assert torch.equal(keys.core, torch.full((2, 2), 0.5))
    left, right = leading_singular_vectors(keys.core.detach())
    for vector in (left, right):
        torch.testing.assert_close(vector, torch.full((2,), 0.5**0.5))


def test_the_best_are_the_same_whatever_sign_the_decomposition_gives():
    core = torch.tensor([[1.0, 0.2], [0.1, 0.5]])
    left, right = leading_singular_vectors(core)
    assert left.sum() > 0
    largest = torch.linalg.svdvals(core)[0]
    torch.testing.assert_close(left @ core @ right, largest)


def test_autocast_does_not_change_the_selection():
    keys, x = _keys(read=4), torch.randn(20, DIM)
    plain = keys(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = keys(x)
    assert torch.equal(found.slot, plain.slot)
    assert found.score.dtype == torch.float32
