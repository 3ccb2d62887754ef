"""Rows of a cache that continue others decode as if they had been decoded alone from the start."""

import pytest
import torch

from model.samples import VARIANTS, ids
from moesaic.data.batch import InputRows
from moesaic.model.transformer import Transformer

SOURCES = [4, 2, 3]
PROMPTS = [3, 1, 2]


def decoded_anew(model, source, prompt, *, of, tokens):
    """The next logits of each row in a new cache, given all tokens after its prompt."""
    cache = model.init_cache(model.encode(source.select(of)), rows=len(of))
    words = [prompt.values[i, : prompt.lengths[i]].tolist() for i in of.tolist()]
    fed = [[*word, *more] for word, more in zip(words, tokens.tolist(), strict=True)]
    return model.step(InputRows.from_lists(fed), cache)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_that_continue_others_decode_as_rows_of_a_new_cache(name):
    """Three sources, prompts of several lengths; their beams are exchanged, sources are dropped."""
    torch.manual_seed(3)
    model = Transformer(VARIANTS[name]).eval()
    source, prompt = ids(3, SOURCES, width=4), ids(3, PROMPTS, width=3)
    cache = model.init_cache(model.encode(source), rows=3)
    model.step(prompt, cache)
    of, tokens = torch.arange(3), torch.zeros(3, 0, dtype=torch.long)
    moves = [
        (torch.tensor([0, 0, 1, 1, 2, 2]), None),  # two beams of each
        (torch.tensor([1, 0, 2, 2, 5, 4]), None),
        (torch.tensor([5, 4, 5, 1, 1, 0]), torch.tensor([2, 0])),  # three of the last and first
        (torch.tensor([2, 0, 1, 3, 4, 4]), None),
        (torch.tensor([4]), torch.tensor([1])),
    ]
    for step, (rows, sources) in enumerate(moves):
        cache.reorder(rows, sources)
        of, tokens = of[rows], tokens[rows]
        new = torch.arange(len(rows)) * 3 % 11 + 5 + step
        tokens = torch.cat([tokens, new[:, None]], 1)
        found = model.step(InputRows.full(new[:, None]), cache)
        wanted = decoded_anew(model, source, prompt, of=of, tokens=tokens)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert cache.rows == 1


def test_several_tokens_at_once_follow_those_of_their_own_beam():
    model = Transformer(VARIANTS["dense"]).eval()
    source, prompt = ids(2, [4, 2], width=4), ids(2, [1, 2], width=2)
    cache = model.init_cache(model.encode(source), rows=2)
    model.step(prompt, cache)
    cache.reorder(torch.tensor([0, 0, 1, 1]))
    more = InputRows.from_lists([[5, 6, 7], [8], [9, 10], [11, 12, 13]])
    model.step(more, cache)
    cache.reorder(torch.tensor([1, 0, 2, 2]))
    found = model.step(InputRows.full(torch.full((4, 2), 9)), cache)
    of = torch.tensor([0, 0, 1, 1])
    for row, earlier in enumerate(([8], [5, 6, 7], [9, 10], [9, 10])):
        tokens = torch.tensor([[*earlier, 9, 9]])
        wanted = decoded_anew(model, source, prompt, of=of[row : row + 1], tokens=tokens)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-4)


def test_keys_stay_where_they_are_when_beams_are_exchanged():
    model = Transformer(VARIANTS["dense"]).eval()
    cache = model.init_cache(model.encode(ids(2, [4, 2], width=4)), rows=2)
    model.step(ids(2, [1, 1], width=1), cache)
    (state,), *_ = cache.mixers
    before = state.key.data_ptr(), cache.nbytes
    cache.reorder(torch.tensor([0, 0, 0, 1, 1, 1]))
    for _ in range(4):
        model.step(InputRows.full(torch.full((6, 1), 9)), cache)
        cache.reorder(torch.tensor([2, 0, 0, 3, 5, 4]))
    (state,), *_ = cache.mixers
    assert (state.key.data_ptr(), cache.nbytes) == before
    assert state.used == 1 + 4 * 3
