"""Generation forces the first token, suppresses tokens, and restores the model's mode."""

import pytest
import torch

from model.samples import VARIANTS, ids
from moesaic.model.generate import Beam, Greedy, append_tag, generate
from moesaic.model.transformer import Transformer

TAG = torch.tensor([6, 7])


@pytest.mark.parametrize("name", ["rotary-top2", "decoder-only"])
def test_the_greedy_answer_is_the_argmax_of_full_forward_passes(name):
    model = Transformer(VARIANTS[name]).eval()
    source = ids(2, [4, 2], width=4)
    answers = generate(model, source, tag=TAG, search=Greedy(), max_tokens=6)
    for row in range(2):
        words = source[row][source[row] != 0]
        generated = answers[row][0].ids
        prompt = [int(TAG[row])]
        if not model.config.encoder.layers:
            prompt = [*words.tolist(), *prompt]
        for place, token in enumerate(generated):
            fed = torch.tensor([[*prompt, *generated[:place]]])
            one = torch.zeros(1, dtype=torch.long)
            cache = model.init_cache(model.encode(words[None]), one)
            logits = model.step(fed, cache)[0]
            logits[[0, 1, 3, 4]] = float("-inf")
            assert int(logits.argmax()) == token


def test_suppressed_tokens_are_not_generated():
    model = Transformer(VARIANTS["rotary-top2"])
    source = ids(2, [4, 2], width=4)
    free = generate(model, source, tag=TAG, max_tokens=8)
    generated = {token for (best,) in free for token in best.ids}
    assert generated
    other = generate(model, source, tag=TAG, max_tokens=8, suppress_tokens=tuple(generated))
    assert not generated & {token for (best,) in other for token in best.ids}


def test_the_mode_of_the_model_is_restored_and_nothing_needs_gradients():
    model = Transformer(VARIANTS["rotary-top2"]).train()
    generate(model, ids(2, [4, 2], width=4), tag=TAG, search=Beam(size=2), max_tokens=3)
    assert model.training


def test_an_empty_batch_returns_no_hypotheses():
    model = Transformer(VARIANTS["rotary-top2"])
    none = torch.empty(0, 3, dtype=torch.long)
    assert generate(model, none, tag=torch.empty(0, dtype=torch.long)) == []


def test_a_tag_is_appended_after_the_last_real_token():
    rows = append_tag(torch.tensor([[5, 6, 0], [5, 6, 7]]), tag=torch.tensor([9, 8]))
    assert rows.tolist() == [[5, 6, 9, 0], [5, 6, 7, 8]]
