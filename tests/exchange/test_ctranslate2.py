"""CTranslate2 computes the dense encoder-decoders that it is given, and no others are written."""

import pytest
from encoder_decoder_models import MODELS
from transformers_models import LAYOUTS, TheirModel

from moesaic.core.errors import CheckpointError
from moesaic.data.collators import EncoderDecoderCollator
from moesaic.data.language_tag import FirstTargetToken
from moesaic.exchange import export_ctranslate2, export_model
from moesaic.exchange.import_model import import_model
from moesaic.model.config import Stack
from moesaic.moe.config import NoMoE
from moesaic.recipes.shaped_recipes import nllb_shaped
from moesaic.testing.tiny_models import synthetic_run, text_of
from moesaic.train.run_training import train

pytest.importorskip("transformers", reason="needs the extra [ctranslate2]")
pytest.importorskip("ctranslate2", reason="needs the extra [ctranslate2]")


def imported(model, path):
    LAYOUTS["fused"](model.build(), path / "theirs")
    import_model(path / "theirs", out=path / "ours")
    return path / "ours"


@pytest.mark.parametrize("name", ["m2m_100", "m2m_100, gelu, unscaled", "t5", "t5 1.1"])
def test_ctranslate2_computes_the_log_probabilities_and_answers_of_ours(name, tmp_path):
    ours = imported(MODELS[name], tmp_path)
    _, found = export_ctranslate2.export_ctranslate2(ours, out=tmp_path / "out", verify=True)
    assert found.inputs == found.greedy == found.beam == 50
    assert found.difference <= 1e-4


@pytest.mark.parametrize("tag", [FirstTargetToken(), None])
def test_a_dense_model_trained_here_answers_the_same_with_its_tokens(tag, tmp_path, monkeypatch):
    shaped, base = nllb_shaped(), synthetic_run(steps=20)
    collator = EncoderDecoderCollator() if tag is None else EncoderDecoderCollator(tag=tag)
    data = base.data.replace(loader=text_of(base).loader.replace(collator=collator))
    dense = Stack(layers=2, moe_every=0)
    model = shaped.model.replace(vocab_size=400, dim=32, moe=NoMoE(), encoder=dense, decoder=dense)
    run = base.replace(model=model, data=data, optimizer=shaped.optimizer)
    train(run, tmp_path / "ours")
    opened, check = [], export_model.require_unchanged
    monkeypatch.setattr(
        export_model, "require_unchanged", lambda path: (opened.append(path), check(path))
    )
    exported, found = export_ctranslate2.export_ctranslate2(
        tmp_path / "ours", out=tmp_path / "out", verify=True
    )
    assert len(opened) == 1  # weights are hashed once
    assert exported.family == "m2m_100"
    assert found.inputs == found.greedy == found.beam == 50
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch):
    ours = imported(MODELS["m2m_100"], tmp_path)
    monkeypatch.setattr(export_ctranslate2, "field_of", lambda *_: 3)
    with pytest.raises(CheckpointError, match="CTranslate2 computes another model"):
        export_ctranslate2.export_ctranslate2(ours, out=tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (MODELS["nllb-moe"], r"no layers with experts, .* is 4: --to hf writes"),
        (TheirModel("Llama"), r"encoder-decoders .*, but this is llama: .* --to gguf"),
        (TheirModel("Granite"), r"but this is granite: --to hf writes .* transformers$"),
    ],
)
def test_a_model_that_it_cannot_compute_is_refused_with_the_nearest_way(model, sentence, tmp_path):
    ours = imported(model, tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        export_ctranslate2.export_ctranslate2(ours, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
