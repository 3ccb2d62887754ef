"""Tokenizer training: exact size, reproducible, balanced over languages."""

import subprocess
import sys

import pytest

import pipeline_cases as cases
from moesaic.core.errors import ConfigError, DataError
from moesaic.data.train_tokenizer import (
    BPE,
    TrainedTokenizer,
    Unigram,
    balanced_lines,
    train_tokenizer,
)

TEXTS = {code: [cases.sentence(code, i) for i in range(80)] for code in cases.LANGUAGES}
_TRAIN = """
from moesaic.data.train_tokenizer import BPE, TrainedTokenizer, Unigram, train_tokenizer
for algorithm in (BPE(), Unigram()):
    config = TrainedTokenizer(algorithm=algorithm, vocab_size=340, sample_lines=300)
    print(train_tokenizer(%r, %r, config).fingerprint)
"""


@pytest.mark.parametrize("algorithm", [BPE(), Unigram()], ids=["bpe", "unigram"])
@pytest.mark.parametrize("size", [266, 300, 3000])
def test_the_vocabulary_has_exactly_the_requested_size(algorithm, size):
    config = TrainedTokenizer(algorithm=algorithm, vocab_size=size, sample_lines=300)
    tokenizer = train_tokenizer(TEXTS, cases.LANGUAGES, config)
    assert tokenizer.vocab_size == size
    names = [tokenizer.id_to_token(i) for i in range(size)]
    assert len(set(names)) == size
    assert any(name.startswith("<unused_") for name in names) == (size == 3000)


def test_training_in_another_process_gives_the_same_tokenizer():
    configs = [
        TrainedTokenizer(algorithm=a, vocab_size=340, sample_lines=300) for a in (BPE(), Unigram())
    ]
    here = [train_tokenizer(TEXTS, cases.LANGUAGES, config).fingerprint for config in configs]
    command = [sys.executable, "-c", _TRAIN % (TEXTS, cases.LANGUAGES)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.split() == here, found.stderr


def test_a_vocabulary_without_space_for_pieces_is_refused():
    with pytest.raises(ConfigError, match="expected at least 266: 5 special tokens, 4 language"):
        train_tokenizer(TEXTS, cases.LANGUAGES, TrainedTokenizer(vocab_size=265))


def test_a_language_given_twice_and_no_text_at_all_are_refused():
    with pytest.raises(ConfigError, match="twice"):
        train_tokenizer(TEXTS, ("deu_Latn", "deu_Latn"), TrainedTokenizer())
    with pytest.raises(DataError, match="no text"):
        train_tokenizer({"deu_Latn": []}, ("deu_Latn",), TrainedTokenizer())


def test_languages_have_temperature_scaled_shares_of_the_lines():
    texts = {"a": [f"a{i}" for i in range(3200)], "b": [f"b{i}" for i in range(100)]}
    sample = balanced_lines(texts, lines=900, temperature=5.0)
    of = {code: sum(n for line, n in sample if line[0] == code) for code in texts}
    assert of["a"] / of["b"] == pytest.approx(32 ** (1 / 5), rel=0.05)
    assert sum(of.values()) == pytest.approx(900, abs=2)


def test_the_sample_does_not_depend_on_the_order_or_repetition_of_lines():
    lines = [f"line {i}" for i in range(500)]
    once = balanced_lines({"a": lines}, lines=100, temperature=1.0)
    again = balanced_lines({"a": lines[::-1] + lines}, lines=100, temperature=1.0)
    assert sorted(once) == sorted(again)


def test_a_small_language_gets_pieces_of_its_own():
    rare = ["ქართული ენა", "ენა ქართული", "ქართული"]
    texts = {"eng_Latn": [f"word{i} and word{i + 1}" for i in range(3000)], "kat_Geor": rare}
    tokenizer = train_tokenizer(
        texts, tuple(texts), TrainedTokenizer(vocab_size=420, sample_lines=2000)
    )
    tokens = sum(map(len, tokenizer.encode_batch(rare)))
    assert tokens < 0.5 * sum(map(len, rare))


def test_a_frequent_placeholder_is_one_piece():
    texts = {
        "eng_Latn": [f"{w} %(count)s {{name}} %d" for w in ("add", "move", "drop", "list")] * 9
    }
    config = TrainedTokenizer(vocab_size=400, sample_lines=500)
    tokenizer = train_tokenizer(texts, ("eng_Latn",), config)
    pieces = [tokenizer.id_to_token(i) for i in tokenizer.encode("add %(count)s {name} %d")]
    assert pieces[-3:] == [" %(count)s", " {name}", " %d"]
