"""The model returns states where tokens are predicted, trains, and decodes as it trained."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE, VARIANTS, batch_for
from moesaic.data.batch import IGNORE_LABEL, InputRows
from moesaic.model.head import LanguageModelHead
from moesaic.model.transformer import Transformer
from moesaic.optim.optimizer import AdamW


@pytest.mark.parametrize("name", VARIANTS)
def test_output_holds_the_predicted_positions_in_row_major_order(name):
    config = VARIANTS[name]
    batch = batch_for(config)
    output = Transformer(config)(batch)
    real = batch.labels != IGNORE_LABEL
    assert torch.equal(output.label, batch.labels[real])
    assert torch.equal(output.row, real.nonzero()[:, 0])
    assert output.hidden.shape == (batch.num_predicted, config.dim)


def test_records_name_their_layers_and_count_real_tokens_only():
    batch = batch_for(BASE)
    records = Transformer(BASE)(batch).records
    assert [r.layer for r in records] == ["encoder.1", "decoder.0", "decoder.1"]
    assert records[0].routing.num_tokens == int(batch.source.lengths.sum())
    assert records[1].routing.num_tokens == int(batch.target.lengths.sum())
    assert torch.equal(records[0].row, batch.source.real.nonzero()[:, 0])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    model = Transformer(VARIANTS[name])
    output = model(batch_for(VARIANTS[name]))
    losses = [term for record in output.records for term in record.losses.values()]
    (model.loss(output).total + sum(losses)).backward()
    for parameter_name, parameter in model.named_parameters():
        if name == "hash" and "router.gate" in parameter_name:
            assert parameter.grad is None  # nobody asks it
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_and_steps_with_a_cache_equal_the_forward_pass(name):
    config = VARIANTS[name]
    model, batch = Transformer(config).eval(), batch_for(config)
    labels = torch.where(batch.target.real, 7, IGNORE_LABEL)  # every position is scored
    output = model(replace(batch, labels=labels))
    logits = model.predict(output.hidden)
    cache = model.init_cache(model.encode(batch.source), rows=batch.rows)
    newest = InputRows(batch.target.values[:, :3], torch.tensor([2, 1, 2, 3]))
    rows, place = torch.arange(batch.rows), newest.lengths - 1
    while rows.numel():
        got = model.step(newest, cache)
        wanted = zip(rows.tolist(), place.tolist(), strict=True)
        want = torch.stack([logits[output.row == row][at] for row, at in wanted])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        alive = (place + 1 < batch.target.lengths[rows]).nonzero()[:, 0]
        cache.reorder(alive, alive)
        rows, place = rows[alive], place[alive] + 1
        newest = InputRows.full(batch.target.values[rows, place][:, None])


@pytest.mark.parametrize("name", ["rotary-top2", "decoder-only"])
def test_it_overfits_a_batch(name):
    torch.manual_seed(1)
    config = VARIANTS[name].replace(head=LanguageModelHead(label_smoothing=0))
    model, batch = Transformer(config), batch_for(config)
    optimizer = AdamW(lr=1e-2).build(model.named_parameters(), kinds=model.parameter_kinds())
    first = last = 0.0
    for step in range(40):
        output = model(batch)
        loss = model.loss(output).total / batch.num_predicted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (first or loss.item(), loss.item())
        assert step < 39 or last < 0.1 * first


def test_bfloat16_autocast_is_near_float32():
    model, batch = Transformer(BASE).eval(), batch_for(BASE)
    plain = model.loss(model(batch)).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
        loss = model.loss(output).total
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0.5)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_dropout_acts_in_training_only():
    model, batch = Transformer(BASE.replace(dropout=0.5)), batch_for(BASE)
    other = replace(batch, key=batch.key + 1)
    assert torch.equal(model(batch).hidden, model(batch).hidden)
    assert not torch.equal(model(batch).hidden, model(other).hidden)
    model.eval()
    assert torch.equal(model(batch).hidden, model(batch).hidden)


def test_a_row_without_a_source_is_still_finite():
    batch = batch_for(BASE)
    batch.source.lengths[1] = 0
    output = Transformer(BASE)(batch)
    assert output.hidden.isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_without_rows_gives_zero_loss_and_zero_gradients(name):
    model, batch = Transformer(VARIANTS[name]), batch_for(VARIANTS[name])
    output = model(batch.select(slice(0)))
    losses = [term for record in output.records for term in record.losses.values()]
    total = model.loss(output).total + sum(losses)
    total.backward()
    assert total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
