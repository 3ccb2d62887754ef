"""Law: decoding the ids of a text returns it, and no text encodes to a tag or special token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_cases as cases
from moesaic.data.tokenizer import SPECIALS, Tokenizer, language_token
from moesaic.data.train_tokenizer import BPE, TrainedTokenizer, Unigram, train_tokenizer

SPELT = ("<deu_Latn>", "<0x41>", "<unused_0>", "▁", "Ġ", "%(name)s", "{0}", "%1$d", "\ufeff")
ODD = ("\0", "\r\n", "\t", "\u200d", "e\u0301", "é", "\u3000", "🏳️\u200d🌈", " ", "  ", "\U0010ffff")
HARD = st.sampled_from([*SPECIALS, *SPELT, *ODD])
TEXT = st.lists(st.one_of(st.text(max_size=12), HARD), max_size=8).map("".join)


@pytest.fixture(scope="module", params=[BPE(), Unigram()], ids=["bpe", "unigram"])
def tokenizer(request) -> Tokenizer:
    # hostile training text: the words of the special tokens are frequent in it
    lines = [cases.sentence("eng_Latn", i) for i in range(60)] + [
        "<deu_Latn> <0x41> <pad> ▁ {0}"
    ] * 9
    config = TrainedTokenizer(algorithm=request.param, vocab_size=330, sample_lines=200)
    return train_tokenizer({"eng_Latn": lines}, ("eng_Latn", "deu_Latn"), config)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_decoding_undoes_encoding_for_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_no_text_encodes_to_a_tag_or_special_token(tokenizer, text):
    reserved = len(SPECIALS) + len(tokenizer.languages)
    ids = tokenizer.encode(text)
    assert all(reserved <= i < tokenizer.vocab_size for i in ids)
    assert not any(tokenizer.id_to_token(i).startswith("<unused_") for i in ids)
    assert tokenizer.encode_batch([text, "a"])[0] == ids


def test_specials_and_tags_are_left_out_of_decoded_text(tokenizer):
    body = tokenizer.encode("aei 12")
    ids = [0, 1, tokenizer.vocabulary.tag("deu_Latn"), *body, 2, 3, 4, 0]
    assert tokenizer.decode(ids) == "aei 12"
    assert tokenizer.id_to_token(tokenizer.vocabulary.tag("deu_Latn")) == language_token("deu_Latn")
