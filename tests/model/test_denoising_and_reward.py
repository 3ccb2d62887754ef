"""PatchDenoising and reward heads against their definitions, on a whole tiny model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moesaic.data.batch import IGNORE_LABEL, Batch, InputRows
from moesaic.data.images import ImagePatches, SyntheticBars
from moesaic.data.row_loader import RowLoader
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.decoder_mask import FullMask
from moesaic.model.inputs import Patches
from moesaic.model.pooled_heads import Reward
from moesaic.model.transformer import Transformer
from moesaic.model.value_heads import PatchDenoising
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.noise_schedule import DDPM, RectifiedFlow

SHAPE = {
    "dim": 16,
    "encoder": Stack(layers=0),
    "decoder": Stack(layers=1, moe_every=0),
    "attention": AttentionConfig(heads=2),
    "feed_forward": FeedForwardConfig(hidden=16),
}


def images(rows: int = 12) -> Batch:
    data = ImagePatches(source=SyntheticBars(number=60)).open(print)
    return next(RowLoader(data, rows=rows, seed=2, prefetch=0))


@pytest.mark.parametrize("schedule", [RectifiedFlow(), DDPM()], ids=["flow", "ddpm"])
def test_the_noise_of_a_row_is_a_function_of_its_key_alone(schedule):
    head = PatchDenoising(channels=4, classes=10, schedule=schedule)
    whole, part = images(), images().select(slice(3, 7))
    made, alone = head.training_batch(whole), head.training_batch(part)
    assert torch.equal(made.target.values[3:7], alone.target.values)
    assert torch.equal(made.labels[3:7], alone.labels)
    other = head.training_batch(replace(whole, key=whole.key + 1))
    assert not torch.isclose(other.labels, made.labels).all(dim=(1, 2)).any()


def test_noise_is_standard_normal_and_time_uniform():
    head = PatchDenoising(channels=4, schedule=DDPM())
    key = torch.arange(4000)
    clean = torch.zeros(4000, 16, 4)
    batch = Batch(InputRows.empty(4000), InputRows.full(clean), clean, {}, key)
    made = head.training_batch(batch)
    noise, time = made.labels, made.target.values[:, 0, -2]
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float(time.mean()) - 0.5) < 0.02
    assert 0 <= float(time.min()) < float(time.max()) < 1


def test_a_class_is_dropped_as_often_as_the_config_says():
    head = PatchDenoising(channels=4, classes=10, class_dropout=0.25)
    batch = images(600)
    kind = head.training_batch(batch).target.values[:, 0, -1].long()
    dropped = kind == 10
    assert abs(float(dropped.float().mean()) - 0.25) < 0.06
    assert torch.equal(kind[~dropped], batch.groups["class"][~dropped])


def test_the_denoising_loss_is_the_squared_error_of_each_patch():
    head = PatchDenoising(channels=4, classes=10)
    model = Transformer(
        ModelConfig(
            **SHAPE, head=head, input=Patches(channels=4, classes=10), decoder_mask=FullMask()
        )
    )
    batch = head.training_batch(images())
    output = model(batch)
    predicted = model.predict(output.hidden).view(batch.labels.shape)
    expected = (predicted - batch.labels).square().mean(-1)
    loss = model.loss(output)
    assert head.num_predicted(batch) == 12 * 16
    assert torch.allclose(loss.each.view(12, 16), expected)
    assert torch.allclose(loss.total, expected.sum())


def test_every_patch_reads_every_other():
    head = PatchDenoising(channels=4)
    config = ModelConfig(**SHAPE, head=head, input=Patches(channels=4), decoder_mask=FullMask())
    batch = head.training_batch(images(1))
    values = batch.target.values.clone().requires_grad_()
    output = Transformer(config)(replace(batch, target=InputRows.full(values)))
    output.hidden[0].sum().backward()
    assert (values.grad[0, :, :4].abs().sum(-1) > 0).all()


def pairs() -> Batch:
    rows = [[5, 6, 7], [5, 8], [6, 9, 9, 9], [6, 7, 7], [7, 5], [7, 6]]
    labels = torch.tensor([0, IGNORE_LABEL, 0, IGNORE_LABEL, IGNORE_LABEL, IGNORE_LABEL])
    key = torch.arange(6)
    return Batch(InputRows.empty(6), InputRows.from_lists(rows), labels, {"task": key // 4}, key)


def test_the_reward_loss_is_bradley_and_terry_of_the_labelled_pairs():
    head = Reward()
    model = Transformer(ModelConfig(**SHAPE, head=head, vocab_size=16))
    output = model(pairs())
    score = model.predict(output.hidden)
    assert head.num_predicted(pairs()) == 2
    assert output.row.tolist() == [0, 2]
    chosen, rejected = score[::2], score[1::2]
    loss = model.loss(output)
    assert torch.allclose(loss.each, -F.logsigmoid(chosen - rejected))
    assert torch.allclose(loss.total, loss.each.sum())
    assert loss.metrics["accuracy"].tolist() == (chosen > rejected).float().tolist()


def test_the_score_of_a_row_is_that_of_its_last_token_whatever_the_padding():
    model = Transformer(ModelConfig(**SHAPE, head=Reward(), vocab_size=16))
    batch = pairs()
    wide = F.pad(batch.target.values, (0, 3), value=13)
    padded = replace(batch, target=InputRows(wide, batch.target.lengths))
    assert torch.allclose(model(batch).hidden, model(padded).hidden, atol=1e-6)
