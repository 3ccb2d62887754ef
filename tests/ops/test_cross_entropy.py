"""The chunked loss equals the definition, whatever the chunk."""

import pytest
import torch

from moesaic.ops.chunk_sizes import ChunkSizes, use_chunk_sizes
from moesaic.ops.cross_entropy import cross_entropy, tokens_per_chunk
from ops.references import reference_cross_entropy

N, V, D = 37, 50, 8


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_the_chunked_loss_equals_its_definition(tokens, smoothing, z):
    sizes = ChunkSizes(logits=4 * V * tokens, float32=4 * V * 3, activations=1)
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    label = torch.randint(0, V, (N,))
    results = []
    for function in (cross_entropy, reference_cross_entropy):
        with use_chunk_sizes(sizes):
            loss = function(hidden, weight=weight, label=label, label_smoothing=smoothing, z_loss=z)
        grads = torch.autograd.grad(loss.total * 0.37, (hidden, weight))
        results.append([loss.total, loss.nll, *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_per_token_losses_are_plain_and_outside_the_graph():
    hidden = torch.randn(N, D, requires_grad=True)
    label = torch.randint(0, V, (N,))
    loss = cross_entropy(hidden, weight=torch.randn(V, D), label=label, label_smoothing=0.2)
    assert not loss.nll.requires_grad
    assert loss.total.requires_grad


def test_no_tokens_cost_nothing():
    hidden = torch.randn(0, D, requires_grad=True)
    empty = torch.empty(0, dtype=torch.long)
    loss = cross_entropy(hidden, weight=torch.randn(V, D, requires_grad=True), label=empty)
    loss.total.backward()
    assert loss.total.item() == 0


def test_it_works_without_gradients_and_in_bfloat16():
    with torch.no_grad():
        hidden, weight = torch.randn(N, D).bfloat16(), torch.randn(V, D)
        label = torch.randint(0, V, (N,))
        got = cross_entropy(hidden, weight=weight, label=label)
        want = reference_cross_entropy(hidden, weight=weight, label=label)
    torch.testing.assert_close(got.nll, want.nll, rtol=1e-2, atol=1e-2)


def test_bfloat16_gradients_are_near_those_of_float32():
    hidden = torch.randn(N, D).bfloat16().requires_grad_()
    weight = torch.randn(V, D, requires_grad=True)
    label = torch.randint(0, V, (N,))
    got = torch.autograd.grad(cross_entropy(hidden, weight=weight, label=label).total, weight)[0]
    plain = reference_cross_entropy(hidden.float(), weight=weight, label=label).total
    torch.testing.assert_close(got, torch.autograd.grad(plain, weight)[0], rtol=0.05, atol=0.1)


def test_large_vocabularies_take_few_chunks_of_the_stated_bytes():
    words, meta, cpu = 163_840, torch.device("meta"), torch.device("cpu")  # those of trillion-384
    # 8 chunks of 6,144 tokens
    assert tokens_per_chunk(words, dtype=torch.bfloat16, device=meta) == 819
    assert tokens_per_chunk(words, dtype=torch.float32, device=cpu) == 102


def test_frozen_tables_get_no_gradient():
    hidden = torch.randn(N, D, requires_grad=True)
    weight, label = torch.randn(V, D), torch.randint(0, V, (N,))
    cross_entropy(hidden, weight=weight, label=label).total.backward()
    assert hidden.grad is not None
