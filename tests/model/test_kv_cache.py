"""Reordering a KV cache moves all keys and values of a hypothesis."""

import pytest
import torch

from model.samples import BASE, VARIANTS, ids
from moesaic.data.batch import InputRows
from moesaic.model.transformer import Transformer


@pytest.mark.parametrize("name", ["rotary-top2", "only-tag", "decoupled"])
def test_reordered_rows_decode_as_rows_of_a_new_cache(name):
    model = Transformer(VARIANTS[name]).eval()
    source, prefix = ids(3, [4, 2, 3], width=4), ids(3, [3, 3, 3], width=3)
    order = torch.tensor([2, 0, 0])
    moved = model.init_cache(model.encode(source), torch.arange(3))
    model.step(prefix, moved)
    moved.reorder(order)
    fresh = model.init_cache(model.encode(source), order)
    model.step(prefix.select(order), fresh)
    token = InputRows.full(torch.full((3, 1), 9))
    torch.testing.assert_close(model.step(token, moved), model.step(token, fresh))
    assert moved.rows == 3


def test_a_cache_can_drop_rows():
    model = Transformer(BASE).eval()
    cache = model.init_cache(model.encode(ids(3, [4, 2, 3], width=4)), torch.arange(3))
    model.step(InputRows.full(torch.full((3, 1), 9)), cache)
    cache.reorder(torch.tensor([1]))
    assert cache.rows == 1
    assert model.step(InputRows.full(torch.full((1, 1), 9)), cache).shape == (1, BASE.vocab_size)
