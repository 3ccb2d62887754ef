"""A model that was never trained keeps every placeholder of its sources, with copy units."""

import pytest
import torch

from moesaic.corpus.placeholders import compare_placeholders
from moesaic.corpus.text_rules import SoftwareStrings
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer
from moesaic.model.beam_search import Beam, Greedy, Search
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.serve.source_text import TranslationLimits
from moesaic.serve.translator import Translator

VOCABULARY = 300
TEXTS = [
    "Save %(name)s of {0} to <b>%(dir)s</b>",
    '<a href="https://x.org/a?b=1&c=2">Open</a> &nbsp; $HOME\\n',
    "%s has %d files, %s",
    "{n, plural, one {# file} other {# files}} at me@x.org",
    "No placeholder",
    "{a} {b} {c} {d} {e} {f}",
]


@pytest.fixture(scope="module", params=[2, 0], ids=["encoder-decoder", "decoder-only"])
def translator(request: pytest.FixtureRequest) -> Translator:
    codes = ["deu_Latn", "eng_Latn"]
    lines = {code: ["Save the file", "Open it now", "no files"] for code in codes}
    config = TrainedTokenizer(vocab_size=VOCABULARY, copy_units=6)
    model = ModelConfig(
        vocab_size=VOCABULARY,
        dim=16,
        encoder=Stack(layers=request.param),
        decoder=Stack(layers=1),
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForwardConfig(hidden=16),
    )
    torch.manual_seed(0)
    return Translator(
        Transformer(model),
        tokenizer=train_tokenizer(lines, codes, config),
        limits=TranslationLimits(max_source=40, max_target=60, max_length_ratio=1.0),
        text_rules=SoftwareStrings(tags="keep"),
    )


@pytest.mark.parametrize("search", [Greedy(), Beam(size=2, n_best=2)], ids=["greedy", "beam"])
def test_every_answer_keeps_the_placeholders_of_its_source(
    translator: Translator, search: Search
) -> None:
    results = translator.translate(TEXTS, source="en", target="de", search=search)
    for text, result in zip(TEXTS, results, strict=True):
        for answer in result.alternatives:
            found = compare_placeholders(text, answer.text)
            assert found.kept == found.placeholders


def test_the_parts_of_a_long_text_keep_their_own_placeholders(translator: Translator) -> None:
    text = " ".join(f"Save {{part{i}}} at https://x.org/{i}." for i in range(3)) + " no files." * 9
    result = translator.translate(text, source="en", target="de")
    assert result.parts > 1
    found = compare_placeholders(text, result.text)
    assert found.kept == found.placeholders == 6


def test_traces_name_slots(translator: Translator) -> None:
    assert translator.token_text(translator.tokenizer.copies.ids[2]) == "<copy_1>"
    traced = translator.trace_experts("Save %s", source="en", target="de", translation="%s da")
    assert "<copy_0>" in traced["target"]["tokens"]
