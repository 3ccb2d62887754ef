"""Law: padding changes no state, no loss, no gradient and no routing."""

import pytest
import torch

from head_cases import HEADS, head_batch, widened
from model.samples import VARIANTS, batch_for, padded
from moesaic.model.transformer import Transformer

CASES = {name: (config, batch_for(config), padded) for name, config in VARIANTS.items()}
CASES |= {f"head-{n}": (config, head_batch(n), widened) for n, config in HEADS.items()}


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(name):
    config, batch, with_padding = CASES[name]
    model, found = Transformer(config), []
    for one in (batch, with_padding(batch, 5)):
        output = model(one)
        loss = model.loss(output).total
        terms = [term for record in output.records for term in record.losses.values()]
        model.zero_grad()
        (loss + sum(terms)).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((output, loss, terms, grads))
    (tight, *numbers), (loose, *others) = found
    torch.testing.assert_close(tight.hidden, loose.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tight.label, loose.label, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tight.row, loose.row)
    for here, there in zip(tight.records, loose.records, strict=True):
        assert torch.equal(here.routing.expert, there.routing.expert)
        assert torch.equal(here.row, there.row)
    for here, there in zip(numbers, others, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
