"""Embedding and output table, tied or not."""

import torch

from moesaic.nn.embedding import Embedding, EmbeddingConfig
from moesaic.nn.packing import Packing


def _build(**fields):
    module = Embedding(EmbeddingConfig(**fields), vocab_size=11, dim=4)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_a_tied_table_is_one_parameter():
    assert len(list(_build(tied=True).parameters())) == 1
    assert len(list(_build(tied=False).parameters())) == 2


def test_scaling_multiplies_inputs_and_not_logits():
    module = _build(tied=True, scaled=True)
    ids, packing = torch.tensor([3, 5]), Packing.from_mask(torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(module(ids, packing=packing), module.weight[ids] * 2.0)
    hidden = torch.randn(2, 4)
    torch.testing.assert_close(module.logits(hidden), hidden @ module.weight.t())


def test_the_loss_is_that_of_the_logits():
    module = _build(tied=False)
    hidden, label = torch.randn(6, 4), torch.randint(0, 11, (6,))
    want = torch.nn.functional.cross_entropy(module.logits(hidden), label, reduction="none")
    torch.testing.assert_close(module.loss(hidden, label=label).nll, want)
