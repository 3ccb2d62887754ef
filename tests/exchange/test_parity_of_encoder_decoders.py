"""Imported encoder-decoders against transformers, with small random models of every family."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoder_models import DROPS, MODELS
from torch import Tensor
from transformers_models import assert_exported_alike

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_tensors
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.cli.main import main
from moesaic.data.batch import Batch, InputRows
from moesaic.exchange import compare_with_transformers, stored_prompts
from moesaic.exchange.export_model import export_model
from moesaic.exchange.import_model import import_model
from moesaic.model.transformer import Transformer
from moesaic.serve.open_run import read_model_config

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
each_model = pytest.mark.parametrize("name", MODELS)


def imported(path: Path) -> Transformer:
    run = RunDir(path)
    return load_transformer(read_model_config(run), run.model).eval()


def brought(name: str, path: Path) -> tuple[Any, Transformer]:
    """The model of transformers, and the same imported."""
    theirs = MODELS[name].build()
    theirs.save_pretrained(path / "theirs")
    found = import_model(path / "theirs", out=path / "ours")
    assert [note for note in found.notes if "nothing here reads" in note] == []
    return theirs, imported(path / "ours")


def padded_source(padding: int, *, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two rows of ids and which of them are real."""
    rows = torch.randint(3, 96, (2, max(lengths)))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return rows.masked_fill(~real, padding), real


def batch_of(source: Tensor, real: Tensor, target: Tensor) -> Batch:
    labels = torch.full_like(target, 4)
    rows = InputRows(source, real.sum(1))
    return Batch(rows, InputRows.full(target), labels, {}, torch.arange(len(source)))


def token_by_token(model: Transformer, batch: Batch) -> Tensor:
    cache = model.init_cache(model.encode(batch.source), rows=batch.source.rows)
    ids = batch.target.values
    logits = [model.step(InputRows.full(ids[:, :2]), cache)]
    logits += [model.step(InputRows.full(ids[:, i : i + 1]), cache) for i in range(2, ids.shape[1])]
    return torch.stack(logits, 1)


def watch_routers(model: Any) -> list[Tensor]:
    """Return a list to which each pass adds the weights [tokens, experts] of every router."""
    found: list[Tensor] = []

    def note(_module: Any, _given: Any, output: Any) -> None:
        chosen, weights = output[:2]
        found.append((weights * chosen if weights.shape[-1] == 1 else weights).flatten(0, -2))

    for module in model.modules():
        if type(module).__name__.endswith(("Top2Router", "Top1Router")):
            module.register_forward_hook(note)
    return found


def our_weights(record: Any) -> Tensor:
    routing = record.routing
    table = torch.zeros(routing.num_tokens, routing.num_experts + 1)
    table = table.index_put((routing.token, routing.expert), routing.weight, accumulate=True)
    return table[:, :-1]


@each_model
def test_an_imported_model_computes_routes_and_decodes_as_in_transformers(name, tmp_path):
    theirs, ours = brought(name, tmp_path)
    padded = not (MODELS[name].name == "NllbMoe" and name in DROPS)  # they count padding as tokens
    source, real = padded_source(theirs.config.pad_token_id, lengths=(9, 6 if padded else 9))
    target, routed = torch.randint(3, 96, (2, 8)), watch_routers(theirs)
    wanted = theirs(input_ids=source, attention_mask=real.long(), decoder_input_ids=target).logits
    batch = batch_of(source, real, target)
    output = ours(batch)
    got = ours.predict(output.hidden).view_as(wanted)
    assert (got - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    if name not in DROPS:  # a step of one token drops nothing, here and there
        assert (token_by_token(ours, batch) - wanted[:, 1:]).abs().max() <= 2e-5
    scale = 1 - getattr(theirs.config, "moe_token_dropout", 0.0)
    assert len(routed) == len(output.records) == 2 * MODELS[name].sparse
    for record, weights in zip(output.records, routed, strict=True):
        kept = real.flatten() if record.layer.startswith("encoder") else slice(None)
        torch.testing.assert_close(our_weights(record), scale * weights[kept].float())
        assert bool(record.routing.dropped.any()) == (name in DROPS)


@each_model
def test_gradients_of_an_imported_model_are_those_in_transformers(name, tmp_path):
    theirs, ours = brought(name, tmp_path)
    source, target = torch.randint(3, 96, (2, 9)), torch.randint(3, 96, (2, 8))
    batch = batch_of(source, torch.ones_like(source), target)
    direction = torch.randn(16, 96)
    wanted = theirs(input_ids=source, decoder_input_ids=target).logits.view(16, 96)
    (wanted * direction).sum().backward()
    (ours.predict(ours(batch).hidden) * direction).sum().backward()
    with torch.no_grad():  # a model whose weights are the gradients, imported like one
        for parameter in theirs.parameters():
            unused = torch.zeros_like(parameter)
            parameter.copy_(unused if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    import_model(tmp_path / "gradients", out=tmp_path / "wanted")
    gradients = read_tensors(tmp_path / "wanted/model.safetensors")
    for key, parameter in ours.named_parameters():
        largest = gradients[key].abs().max().clamp(min=1)
        assert (parameter.grad - gradients[key]).abs().max() <= 2e-5 * largest, key


@each_model
def test_an_exported_model_is_loaded_without_a_missing_or_unexpected_key(name, tmp_path):
    theirs, _ = brought(name, tmp_path)
    export_model(tmp_path / "ours", out=tmp_path / "exported", shard_bytes=20_000)
    assert_exported_alike(theirs, type(theirs), tmp_path)


@pytest.mark.parametrize("name", ["nllb-moe", "switch"])
def test_a_comparison_finds_the_same_logits_and_answers_of_an_encoder_decoder(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(stored_prompts, "LENGTHS", (4,))
    monkeypatch.setattr(compare_with_transformers, "ANSWER", 6)
    brought(name, tmp_path)
    found = compare_with_transformers.compare_with_transformers(
        tmp_path / "theirs", ours=tmp_path / "ours"
    )
    assert found.logit_difference <= 1e-5 * max(1, found.largest_logit)
    assert found.inputs == found.greedy == found.beam == 10
    assert ("NllbMoeExperts.forward repaired" in found.text()) == (name == "nllb-moe")


def test_a_model_that_differs_is_not_kept_by_import_or_export(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_prompts, "LENGTHS", (4,))
    monkeypatch.setattr(compare_with_transformers, "ANSWER", 2)
    brought("m2m_100", tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in (["import", "theirs"], ["export", "ours", "--to", "hf"]):
        assert exit_code([*words, "--verify", "--out", "good"]) == 0
        with monkeypatch.context() as patch:
            patch.setattr(compare_with_transformers, "MOST", -1.0)
            assert exit_code([*words, "--verify", "--out", "bad"]) == 2
        shutil.rmtree("good")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def exit_code(words: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code or 0
