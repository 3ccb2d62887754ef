"""Generation forces the first token, suppresses tokens, and restores the model's mode."""

from dataclasses import replace

import pytest
import torch

from model.samples import ROLES, RULES, VARIANTS, VOCABULARY, ids, question
from moesaic.core.errors import CheckpointError, DataError
from moesaic.data.batch import InputRows
from moesaic.model.beam_search import Beam, Greedy, SearchInputs
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.transformer import Transformer

TAG = torch.tensor([6, 7])


@pytest.mark.parametrize("name", ["rotary-top2", "decoder-only"])
def test_the_greedy_answer_is_the_argmax_of_full_forward_passes(name):
    model = Transformer(VARIANTS[name]).eval()
    source = ids(2, [4, 2], width=4)
    answers = generate(
        model, **question(model, source, tag=TAG), rules=RULES, search=Greedy(), max_tokens=6
    )
    for row in range(2):
        words = source.values[row, : source.lengths[row]]
        generated = answers[row][0].ids
        prompt = [int(TAG[row])]
        if not model.config.encoder.layers:
            prompt = [*words.tolist(), *prompt]
        for place, token in enumerate(generated):
            fed = InputRows.from_lists([[*prompt, *generated[:place]]])
            cache = model.init_cache(model.encode(InputRows.full(words[None])), rows=1)
            logits = model.step(fed, cache)[0]
            logits[list(ROLES.suppressed)] = float("-inf")
            assert int(logits.argmax()) == token


def test_suppressed_tokens_are_not_generated():
    model = Transformer(VARIANTS["rotary-top2"])
    source = ids(2, [4, 2], width=4)
    free = generate(model, **question(model, source, tag=TAG), rules=RULES, max_tokens=8)
    generated = {token for (best,) in free for token in best.ids}
    assert generated
    other = generate(
        model,
        **question(model, source, tag=TAG),
        max_tokens=8,
        rules=DecodingRules(ROLES, tuple(generated)),
    )
    assert not generated & {token for (best,) in other for token in best.ids}


def test_the_mode_of_the_model_is_restored_and_nothing_needs_gradients():
    model = Transformer(VARIANTS["rotary-top2"]).train()
    asked = question(model, ids(2, [4, 2], width=4), tag=TAG)
    generate(model, **asked, rules=RULES, search=Beam(size=2), max_tokens=3)
    assert model.training


def test_an_empty_batch_returns_no_hypotheses():
    model = Transformer(VARIANTS["rotary-top2"])
    none = InputRows.full(torch.empty(0, 3, dtype=torch.long))
    assert generate(model, none, prompt=none, rules=RULES) == []


def test_rows_of_the_model_without_a_token_are_never_generated():
    model = Transformer(VARIANTS["rotary-top2"])
    few = DecodingRules(replace(ROLES, size=VOCABULARY - 30))
    assert few.suppressed(VOCABULARY)[-30:] == tuple(range(VOCABULARY - 30, VOCABULARY))
    asked = question(model, ids(2, [4, 2], width=4), tag=TAG)
    answers = generate(model, **asked, rules=few, max_tokens=8)
    assert max(token for (best,) in answers for token in best.ids) < VOCABULARY - 30


def test_an_ordinary_token_with_id_0_can_be_the_whole_answer():
    model = Transformer(VARIANTS["rotary-top2"])
    rest = tuple(range(1, VOCABULARY))
    asked = question(model, InputRows.from_lists([[0, 0, 0], [0]]), tag=torch.zeros_like(TAG))
    answers = generate(model, **asked, rules=DecodingRules(ROLES, rest), max_tokens=3)
    assert [best.ids for (best,) in answers] == [(0, 0, 0)] * 2


@pytest.mark.parametrize("search", [Greedy(), Beam(size=2)], ids=["greedy", "beam"])
@pytest.mark.parametrize("name", ["rotary-top2", "decoder-only", "top-p", "expert-choice", "soft"])
@pytest.mark.parametrize("part", ["norm", "router", "embedding", ""])
def test_weights_that_are_not_finite_are_named(search, name, part):
    model = Transformer(VARIANTS[name])
    value = float("inf") if part == "embedding" else float("nan")
    chosen = [(n, p) for n, p in model.named_parameters() if part in n]
    for _, parameter in chosen[:1] if part else chosen:  # "": every weight
        parameter.data.view(-1)[0 if part else slice(None)] = value
    asked = question(model, ids(2, [4, 2], width=4), tag=TAG)
    with pytest.raises(CheckpointError, match="weights hold") as caught:
        generate(model, **asked, rules=RULES, search=search, max_tokens=4)
    assert chosen[0][0] in str(caught.value)


def test_learned_positions_end_an_answer_instead_of_being_used_twice():
    model = Transformer(VARIANTS["gshard-learned-untied"])  # 32 positions
    assert model.config.encoder.layers
    asked = question(model, ids(2, [4, 2], width=4), tag=TAG)
    answers = generate(model, **asked, rules=RULES, max_tokens=200)
    assert all(len(best.ids) <= 32 for (best,) in answers)
    long = question(model, ids(2, [40, 2], width=40), tag=TAG)
    with pytest.raises(DataError, match="learned 32 positions"):
        generate(model, **long, rules=RULES)
    fed = ids(2, [33, 2], width=33)
    with pytest.raises(RuntimeError, match="max_length=32"):
        model.step(fed, model.init_cache(model.encode(ids(2, [4, 2], width=4)), rows=2))


@pytest.mark.parametrize("search", [Greedy(), Beam(size=3, n_best=3)], ids=["greedy", "beam"])
@pytest.mark.parametrize("name", ["rotary-top2", "decoder-only", "mixers-of-all-kinds"])
def test_answers_through_the_cache_are_those_of_whole_prefixes(name, search):
    """The plain twin decodes every prefix from the start, in a new cache without any reordering."""
    torch.manual_seed(4)
    model, source = Transformer(VARIANTS[name]).eval(), ids(2, [4, 2], width=4)
    limit = torch.tensor([7, 5])
    asked = question(model, source, tag=TAG)
    source, start = asked["source"], asked["prompt"]
    prefixes = [
        (row, values[:length])
        for row, (values, length) in enumerate(
            zip(start.values.tolist(), start.lengths.tolist(), strict=True)
        )
    ]

    def logits():
        of = torch.tensor([row for row, _ in prefixes])
        cache = model.init_cache(model.encode(source.select(of)), rows=len(prefixes))
        return model.step(InputRows.from_lists([prefix for _, prefix in prefixes]), cache)

    def step(tokens):
        prefixes[:] = [
            (row, [*prefix, token])
            for (row, prefix), token in zip(prefixes, tokens.tolist(), strict=True)
        ]
        return logits()

    def reorder(rows, _sources):
        prefixes[:] = [prefixes[row] for row in rows.tolist()]

    found = generate(model, **asked, search=search, max_tokens=limit, rules=RULES)
    with torch.inference_mode():
        suppressed = torch.tensor(ROLES.suppressed)
        inputs = SearchInputs(logits(), step, reorder, limit, suppressed, ends=(ROLES.eos,))
        plain = search(inputs)
    for ours, theirs in zip(found, plain, strict=True):
        assert [h.ids for h in ours] == [h.ids for h in theirs]
        scores = [h.score for h in theirs]
        assert [h.score for h in ours] == pytest.approx(scores, rel=1e-6, abs=2e-6)
