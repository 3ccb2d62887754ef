"""Heads: each equals its definition, trains all of its model, and is counted as it is."""

import pytest
import torch
import torch.nn.functional as F

from head_cases import HEADS, PAIRED, head_batch
from moesaic.core.errors import ConfigError
from moesaic.model.head import LanguageModelHead
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.pooled_heads import Contrastive
from moesaic.model.transformer import Transformer
from moesaic.model.value_heads import Huber, Regression
from moesaic.model.weights import export_weights, restore_weights


def _states(model: Transformer, name: str):
    batch = head_batch(name)
    return batch, model(batch)


def _regression(batch, hidden: torch.Tensor, model: Transformer) -> torch.Tensor:
    """The loss of each position, by loops."""
    losses, place = [], 0
    for row in range(batch.rows):
        series = batch.labels[row, : batch.target.lengths[row]]
        for start in range(len(series)):
            horizons = []
            for width, head in zip(model.config.head.horizons, model.head.horizons, strict=True):
                points = series[start : start + width]
                guess = head(hidden[place])[: len(points)]
                horizons.append(F.huber_loss(guess, points, delta=2.0))
            losses.append(torch.stack(horizons).mean())
            place += 1
    return torch.stack(losses)


def _classification(batch, hidden: torch.Tensor, model: Transformer) -> torch.Tensor:
    labelled = batch.labels[batch.labels >= 0]
    return F.cross_entropy(model.head.projection(hidden), labelled, reduction="none")


def _contrastive(batch, hidden: torch.Tensor, model: Transformer) -> torch.Tensor:
    vectors = model.head.projection(hidden)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    similarity = torch.exp(vectors[0::2] @ vectors[1::2].t() / 0.5)
    return -torch.log(similarity.diagonal() / similarity.sum(1))


def _reward(batch, hidden: torch.Tensor, model: Transformer) -> torch.Tensor:
    score = model.predict(hidden)
    return -torch.log(torch.sigmoid(score[0::2] - score[1::2]))


def _denoising(batch, hidden: torch.Tensor, model: Transformer) -> torch.Tensor:
    wanted = batch.labels[batch.target.real]
    return ((model.head.projection(hidden) - wanted) ** 2).mean(1)


DEFINITIONS = {
    "regression": _regression,
    "classification": _classification,
    "contrastive": _contrastive,
    "reward": _reward,
    "denoising": _denoising,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_loss_of_a_head_is_its_definition(name: str) -> None:
    model = Transformer(HEADS[name])
    batch, output = _states(model, name)
    loss = model.loss(output)
    expected = DEFINITIONS[name](batch, output.hidden, model)
    torch.testing.assert_close(loss.each, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.total, expected.sum(), rtol=1e-5, atol=1e-6)
    assert len(loss.each) == HEADS[name].head.num_predicted(batch)
    assert tuple(loss.metrics) == HEADS[name].head.metric_names


@pytest.mark.parametrize("name", HEADS)
def test_a_head_reaches_every_parameter_and_is_counted_as_it_is(name: str) -> None:
    model = Transformer(HEADS[name])
    _, output = _states(model, name)
    model.loss(output).total.backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unreached
    assert count_parameters(HEADS[name]).total == sum(p.numel() for p in model.parameters())
    twin = Transformer(HEADS[name])
    restore_weights(twin, export_weights(model))
    torch.testing.assert_close(
        twin.eval()(head_batch(name)).hidden, model.eval()(head_batch(name)).hidden
    )


@pytest.mark.parametrize("name", ["classification", "classification-mean", *PAIRED])
def test_a_pooled_row_is_that_of_the_row_alone(name: str) -> None:
    model = Transformer(HEADS[name]).eval()
    batch, output = _states(model, name)
    row = 4
    alone = model(batch.select(slice(row, row + 2)))
    place = row - 1 if name.startswith("class") else row  # the second row has no class
    torch.testing.assert_close(output.hidden[place : place + 2], alone.hidden)


def test_noise_is_a_function_of_the_key_of_its_row() -> None:
    first, again = head_batch("denoising"), head_batch("denoising")
    assert torch.equal(first.target.values, again.target.values)
    head = HEADS["denoising"].head
    keys = torch.arange(4000)
    clean = torch.zeros(4000, 2, 2)
    batch = first.select(torch.zeros(4000, dtype=torch.long))
    made = head.training_batch(
        type(batch)(
            batch.source,
            type(batch.target)(clean, torch.full((4000,), 2)),
            batch.labels,
            batch.groups,
            keys,
        )
    )
    time, kind = made.target.values[:, 0, 2], made.target.values[:, 0, 3]
    assert abs(float(made.labels.mean())) < 0.03
    assert abs(float(made.labels.std()) - 1) < 0.03
    assert abs(float(time.mean()) - 0.5) < 0.02
    assert abs(float((kind == 3).float().mean()) - 0.1) < 0.02  # the class is dropped


def test_a_head_that_does_not_fit_the_input_is_refused() -> None:
    for name, message in (("regression", "TokenIds"), ("language-model", "Patches")):
        other = HEADS["denoising"].head if message == "Patches" else LanguageModelHead()
        with pytest.raises(ConfigError, match=message):
            HEADS[name].replace(head=other)
    with pytest.raises(ConfigError, match="rising"):
        Regression(horizons=(4, 1))
    assert Huber(delta=1.0)(torch.tensor([0.5, 3.0])).tolist() == [0.125, 2.5]
    assert Contrastive().dim is None


@pytest.mark.parametrize("data", HEADS)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_counts_the_labels_of_its_kind_and_refuses_others_with_a_sentence(name, data):
    model, batch = Transformer(HEADS[name]), head_batch(data)
    refusal = ""
    try:
        model.config.head.num_predicted(batch)
        assert model.loss(model(batch)).total.isfinite()
    except ConfigError as error:
        refusal = str(error)
    assert not refusal or (name != data and "expects" in refusal and "data gives" in refusal)
