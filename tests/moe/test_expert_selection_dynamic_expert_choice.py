"""Expert choice per row: balanced, independent of the batch, not causal."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE
from moesaic.core.errors import ConfigError
from moesaic.model.config import Stack
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection_dynamic import ExpertChoice, Threshold
from moesaic.moe.router_context import RouterContext, TokenContext

E = 4
MOE = MoE(experts=E, select=ExpertChoice())


def _route(logits, row, factor=2.0):
    context = replace(TokenContext.unbatched(len(logits)), row=row)
    return ExpertChoice(capacity_factor=factor)(RouterContext(logits, context))


def test_each_expert_takes_its_best_tokens_of_each_row_with_their_scores():
    lengths = [7, 1, 4]
    row = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    logits = torch.randn(12, E)
    routing = _route(logits, row, factor=1.5)
    scores, pairs = logits.softmax(-1), set()
    for first, length in zip([0, 7, 8], lengths, strict=True):
        room = -(-3 * length // (2 * E))  # the ceiling of 1.5 n / E
        for expert in range(E):
            best = scores[first : first + length, expert].topk(room).indices + first
            pairs |= {(int(token), expert) for token in best}
    assert set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)) == pairs
    torch.testing.assert_close(routing.weight, scores[routing.token, routing.expert])


def test_experts_are_balanced_whatever_the_scores():
    row = torch.zeros(40, dtype=torch.long)
    lopsided = torch.randn(40, E) + torch.tensor([9.0, 0, 0, 0])
    assert _route(lopsided, row, factor=1.0).load().tolist() == [10] * E


def test_routing_of_a_row_is_independent_of_the_batch():
    logits, row = torch.randn(12, E), torch.tensor([0] * 5 + [1] * 7)
    whole, alone = _route(logits, row), _route(logits[5:], row[5:] - 1)
    late = whole.token >= 5
    assert torch.equal(whole.expert[late], alone.expert)
    assert torch.equal(whole.weight[late], alone.weight)
    shuffled = torch.randperm(12)
    assert torch.equal(_route(logits[shuffled], row[shuffled]).load(), whole.load())


def test_no_tokens_are_no_edges():
    assert _route(torch.zeros(0, E), torch.zeros(0, dtype=torch.long)).expert.numel() == 0


def test_a_choice_over_the_sequence_leaks_the_future_and_a_threshold_does_not():
    logits = torch.zeros(6, E)
    logits[:, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4, 8.0, 9.0])
    changed = []
    for rule in (ExpertChoice(capacity_factor=2.0), Threshold(p=0.51)):
        whole, part = (rule(RouterContext.from_logits(part)) for part in (logits, logits[:4]))
        early = whole.token < 4
        pairs = [
            set(zip(r.token[m].tolist(), r.expert[m].tolist(), strict=True))
            for r, m in ((whole, early), (part, torch.ones_like(part.token, dtype=torch.bool)))
        ]
        changed.append(pairs[0] != pairs[1])
    assert changed == [True, False]


def test_a_decoder_refuses_it_and_an_encoder_takes_it():
    with pytest.raises(ConfigError, match=r"ExpertChoice .*encoder\.moe"):
        BASE.replace(moe=MOE)
    with pytest.raises(ConfigError, match="later tokens"):
        BASE.replace(decoder=BASE.decoder.replace(moe=MOE))
    mixed = BASE.replace(encoder=BASE.encoder.replace(moe=MOE))
    assert mixed.routed_moe_of_layer(mixed.encoder, layer=1) == MOE
    assert mixed.routed_moe_of_layer(mixed.decoder, layer=1) == BASE.moe
    BASE.replace(moe=MOE, decoder=BASE.decoder.replace(moe=NoMoE()))
    BASE.replace(moe=MOE, decoder=Stack(layers=2, moe_every=0))


def test_gradients_are_those_of_plain_scores():
    logits = torch.randn(6, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: ExpertChoice()(RouterContext.from_logits(x)).weight, [logits]
    )
