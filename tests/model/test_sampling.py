"""Sampling over a table of probabilities, against the definitions of its rules."""

import numpy as np
import pytest
import torch

from model.test_beam_search import EOS, ROOM, Table
from moesaic.model.beam_search import Greedy, NonFiniteLogitsError
from moesaic.model.sampling import Sample

RULES = [
    Sample(),
    Sample(temperature=0.5, seed=3),
    Sample(top_k=2),
    Sample(top_p=0.6),
    Sample(min_p=0.3),
    Sample(temperature=1.4, top_k=4, top_p=0.8, min_p=0.1),
]


def by_definition(rule: Sample, logits: torch.Tensor) -> list[float]:
    """Plain lists, a token at a time."""
    raw = [float(x) / rule.temperature for x in logits]
    kept = sorted(range(len(raw)), key=lambda i: -raw[i])[: rule.top_k or None]

    def normalised(tokens):
        total = sum(np.exp(raw[i]) for i in tokens)
        return {i: np.exp(raw[i]) / total for i in tokens}

    nucleus, mass = [], 0.0
    for token, prob in normalised(kept).items():
        if mass < rule.top_p:
            nucleus.append(token)
            mass += prob
    prob = normalised(nucleus)
    likely = [i for i in nucleus if prob[i] >= rule.min_p * max(prob.values())]
    prob = normalised(likely)
    return [prob.get(i, 0.0) for i in range(len(raw))]


@pytest.mark.parametrize("rule", RULES)
def test_the_distribution_equals_its_definition(rule):
    logits = torch.randn(8, 7, generator=torch.Generator().manual_seed(1)) * 2
    found = rule.probabilities(logits.log_softmax(-1))
    expected = torch.tensor([by_definition(rule, row) for row in logits])
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("rule", RULES)
def test_draws_have_the_frequencies_of_the_distribution(rule):
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(2))
    count = 20_000
    log_prob = logits.log_softmax(-1).expand(count, 6)
    drawn = rule.draw(log_prob, row_key=torch.arange(count), number=4)
    expected = rule.probabilities(log_prob[:1])[0]
    frequency = torch.bincount(drawn, minlength=6) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() <= 4.5 * deviation).all()


def test_another_seed_row_or_position_draws_another_token():
    log_prob = torch.zeros(4096, 512).log_softmax(-1)
    keys = torch.arange(4096)
    first = Sample().draw(log_prob, row_key=keys, number=0)
    for other in (
        Sample(seed=1).draw(log_prob, row_key=keys, number=0),
        Sample().draw(log_prob, row_key=keys, number=1),
        first.roll(1),
    ):
        assert (first == other).float().mean() < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_temperature_zero_is_greedy_search(seed):
    table = Table(seed, sources=3)
    greedy, sampled = Greedy()(table.problem()), Sample(temperature=0)(table.problem())
    assert [[h.ids for h in found] for found in sampled] == [[h.ids for h in f] for f in greedy]
    for (here,), (there,) in zip(sampled, greedy, strict=True):
        assert (here.score, here.finished) == (pytest.approx(there.score), there.finished)


def test_an_answer_has_the_models_log_probability():
    table = Table(3, sources=4)
    for source, (answer,) in enumerate(Sample(temperature=2.0, seed=5)(table.problem())):
        ids = (*answer.ids, EOS) if answer.finished else answer.ids
        assert answer.log_prob == pytest.approx(table.log_prob(ids, source), abs=1e-4)
        assert answer.score == pytest.approx(answer.log_prob / len(ids), abs=1e-4)
        assert answer.finished or len(answer.ids) == ROOM


def test_suppressed_and_blocked_tokens_are_never_drawn():
    table = Table(4, sources=200)
    inputs = table.problem(forbidden=(0, 1, EOS))
    answers = Sample(no_repeat_ngram_size=1, temperature=3.0)(inputs)
    assert {t for (h,) in answers for t in h.ids} <= {3, 4, 5}
    assert all(len(set(h.ids)) == len(h.ids) == 3 and not h.finished for (h,) in answers)


def test_the_observer_sees_every_token_and_may_end_a_row():
    table = Table(6, sources=50)
    seen: dict[int, list[int]] = {}

    def observe(source, token):
        for row, word in zip(source.tolist(), token.tolist(), strict=True):
            seen.setdefault(row, []).append(word)
        return token == 4

    answers = Sample()(table.problem(observer=observe))
    assert {row: tuple(ids) for row, ids in seen.items()} == {
        row: h.ids for row, (h,) in enumerate(answers) if h.ids
    }
    ended = [h for (h,) in answers if 4 in h.ids]
    assert ended
    assert all(h.finished and h.ids.index(4) == len(h.ids) - 1 for h in ended)


def test_logits_that_are_not_finite_are_refused():
    table = Table(1)
    table.first[0, 2] = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="at generated token 1"):
        Sample()(table.problem())
