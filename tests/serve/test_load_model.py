import json

import pytest
import torch

import moesaic
from moesaic.core.errors import CheckpointError, DataError, FileError
from moesaic.data.batch import InputRows
from moesaic.serve.load_model import load
from moesaic.serve.text_generator import TextGenerator
from serve.language_model_run import write_language_model_run

TEXTS = ["the end of the text", "ten"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_language_model_run(tmp_path_factory.mktemp("runs") / "small")


def test_a_loaded_model_continues_texts_as_the_command_does(run):
    limits = {"prompts": TEXTS, "language": "eng"}
    assert load(run.path).generate(**limits) == TextGenerator.open(run.path).generate(**limits)


def test_a_score_is_the_sum_of_log_probabilities_of_the_logits(run):
    model = moesaic.load(str(run.path))
    begin, end = model.tokenizer.vocabulary.tag("eng_Latn"), model.tokenizer.vocabulary.eos
    for text, score in zip(TEXTS, model.score(TEXTS), strict=True):
        row = torch.tensor([[begin, *model.tokenizer.encode(text), end]])
        logs = model.logits(row[:, :-1]).log_softmax(-1)
        assert score == pytest.approx(logs.gather(2, row[:, 1:, None]).sum().item(), rel=1e-5)
    with pytest.raises(DataError, match="a text is empty"):
        model.score([" "])


def test_logits_have_a_graph_and_are_those_of_decoding(run):
    model, ids = load(run.path), torch.tensor([[5, 6, 7]])
    logits = model.logits(ids)
    cache = model.model.init_cache(None, rows=1)
    assert torch.allclose(logits[:, -1], model.model.step(InputRows.full(ids), cache), atol=1e-5)
    logits.sum().backward()
    assert model.model.embedding.weight.grad is not None


def test_a_model_that_was_trained_further_is_saved_as_a_directory_like_its_first(run, tmp_path):
    model = load(run.path)
    with torch.no_grad():
        model.model.embedding.weight.mul_(2)
    model.save(tmp_path / "after")
    again = load(tmp_path / "after")
    ids = torch.tensor([[5, 6, 7]])
    assert again.logits(ids).equal(model.logits(ids))
    assert not again.logits(ids).equal(load(run.path).logits(ids))
    with pytest.raises(FileError, match="exists already"):
        model.save(tmp_path / "after")


def test_a_model_without_a_tokenizer_has_logits_alone(run, tmp_path):
    load(run.path).save(tmp_path / "ids")
    (tmp_path / "ids/tokenizer.json").unlink()
    (tmp_path / "ids/run.json").unlink()
    model = load(tmp_path / "ids")
    assert model.logits(torch.tensor([[1]])).shape == (1, 1, 300)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        model.generate("the")


def test_a_directory_of_transformers_is_named_with_the_way_to_import_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(CheckpointError, match="moesaic import"):
        load(tmp_path)
