"""A product-key memory adds the values of a few slots and reads no others."""

import torch

from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.parameter_spec import FeedForwardShape

DIM, SIDE, SLOTS = 32, 8, 5
CONFIG = ProductKeyMemory(keys_per_side=SIDE, slots=SLOTS)
FEED = FeedForwardConfig(hidden=24)


def _layer(config=CONFIG):
    made = config.build(FeedForwardShape(DIM, FEED, bias=False))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def _run(made, x):
    return made(x, context=TokenContext.unbatched(len(x)), router_state=RouterState())


def test_the_output_is_the_feed_forward_plus_a_sum_over_slots():
    made, x = _layer(), torch.randn(6, DIM)
    answer = _run(made, x)
    found = made.keys(x)
    rows = []
    for token in range(6):
        pairs = zip(found.slot[token], found.score[token], strict=True)
        read = made.input_projection(x[token])
        held = sum(s * (made.pre_values[i] @ read) * made.values[i] for i, s in pairs)
        rows.append(made.feed_forward(x[token]) + held @ made.out.weight.t())
    torch.testing.assert_close(answer.out, torch.stack(rows), rtol=1e-4, atol=1e-4)
    assert answer.record is None


def test_gradients_are_those_of_the_sum():
    made, x = _layer(), torch.randn(6, DIM, requires_grad=True)
    found, weigh = made.keys(x), torch.randn(6, DIM)
    pre = torch.einsum("tmp,tp->tm", made.pre_values[found.slot], made.input_projection(x))
    held = torch.einsum("tm,tmv->tv", found.score * pre, made.values[found.slot])
    plain = made.feed_forward(x) + made.out(held)
    leaves = [x, *made.parameters()]
    got = torch.autograd.grad((_run(made, x).out * weigh).sum(), leaves)
    want = torch.autograd.grad((plain * weigh).sum(), leaves)
    for here, there in zip(got, want, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)


def test_a_token_reads_the_counted_share_of_both_tables():
    made, x = _layer(), torch.randn(1, DIM)
    _run(made, x).out.square().sum().backward()
    pieces = CONFIG.parameter_specs(FeedForwardShape(DIM, FEED, bias=False))
    shares = {piece.shape: piece.active_fraction for piece in pieces if piece.kind == "expert"}
    for table in (made.pre_values, made.values):
        touched = (table.grad.abs().sum(1) > 0).sum()
        assert touched == SLOTS == shares[tuple(table.shape)] * SIDE * SIDE


def test_default_widths_are_those_of_the_paper():
    assert CONFIG.value_dims(64) == (4, 12)  # one to three, a quarter of the model together
    assert CONFIG.resolved_key_dim(64) == 32
    assert CONFIG.replace(keys_per_side=2, slots=16).num_slots_read() == 4  # no more than there are


def test_tokens_are_independent():
    made, x = _layer(), torch.randn(6, DIM)
    order = torch.randperm(6)
    torch.testing.assert_close(_run(made, x[order]).out, _run(made, x).out[order])
