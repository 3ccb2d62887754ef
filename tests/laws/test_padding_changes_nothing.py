"""Law: padding changes no state, no loss, no gradient and no routing."""

import pytest
import torch

from model.samples import VARIANTS, batch_for, padded
from moesaic.model.transformer import Transformer


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name):
    model = Transformer(VARIANTS[name])
    batch = batch_for(VARIANTS[name])
    found = []
    for one in (batch, padded(batch, 5)):
        output = model(one)
        loss = model.loss(output).total
        terms = [term for record in output.records for term in record.losses.values()]
        model.zero_grad()
        (loss + sum(terms)).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((output, loss, terms, grads))
    (tight, *numbers), (loose, *others) = found
    torch.testing.assert_close(tight.hidden, loose.hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(tight.label, loose.label)
    assert torch.equal(tight.row, loose.row)
    for here, there in zip(tight.records, loose.records, strict=True):
        assert torch.equal(here.routing.expert, there.routing.expert)
        assert torch.equal(here.row, there.row)
    for here, there in zip(numbers, others, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
