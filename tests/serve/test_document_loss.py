import math

import pytest
import torch

from moesaic.corpus.pair import Text
from moesaic.data.batch import InputRows
from moesaic.serve.document_loss import document_losses
from moesaic.serve.text_generator import TextGenerator
from serve.language_model_run import write_language_model_run

TEXTS = [
    Text("the end of the text\nan end", "eng_Latn", domain="a"),
    Text("ten", "deu_Latn", origin="b.txt"),
    Text(" \n", "eng_Latn"),
    Text("lines and a tent " * 6, "fra_Latn"),
]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return TextGenerator.open(
        write_language_model_run(tmp_path_factory.mktemp("runs") / "small").path
    )


def by_definition(generator, text: Text, *, window: int, stride: int) -> float:
    """A position at a time, each from the tokens of its window before it, by decoding."""
    language = text.language if text.language in generator.tokenizer.languages else "eng_Latn"
    tag = generator.tokenizer.vocabulary.tag(language)
    row = [tag, *generator.tokenizer.encode(text.text.rstrip()), generator.end_token]
    total = 0.0
    for position in range(len(row) - 1):
        # the first window that reads the position
        start = 0
        while start + window <= position:
            start += stride
        cache = generator.model.init_cache(None, rows=1)
        before = torch.tensor([row[start : position + 1]])
        with torch.inference_mode():
            logits = generator.model.step(InputRows.full(before), cache)[0]
        total -= float(logits.log_softmax(-1)[row[position + 1]])
    return total


@pytest.mark.parametrize(("window", "stride"), [(200, 100), (12, 6), (9, 9), (5, 1)])
def test_losses_equal_decoding_a_position_at_a_time(generator, window, stride):
    found = document_losses(generator, TEXTS, window=window, stride=stride)
    kept = [text for text in TEXTS if text.text.strip()]
    for loss, text in zip(found, kept, strict=True):
        expected = by_definition(generator, text, window=window, stride=stride)
        assert loss.nll == pytest.approx(expected, rel=1e-4)
        assert loss.tokens == len(generator.tokenizer.encode(text.text.rstrip())) + 1
        assert loss.num_bytes == len(text.text.rstrip())
    assert [loss.domain for loss in found] == ["a", "b.txt", ""]


def test_a_model_that_is_as_good_as_chance_has_the_vocabularys_perplexity(generator):
    with torch.no_grad():
        uniform = TextGenerator(generator.model, tokenizer=generator.tokenizer)
        before = generator.model.embedding.weight.clone()
        generator.model.embedding.weight.zero_()
    [loss] = document_losses(uniform, TEXTS[:1], window=8, stride=4)
    with torch.no_grad():
        generator.model.embedding.weight.copy_(before)
    assert loss.nll / loss.tokens == pytest.approx(math.log(generator.model.config.vocab_size))
