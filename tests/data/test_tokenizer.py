"""Tokenizer files: saved, loaded, read by Hugging Face tokenizers, refused if foreign."""

import json
import os

import pytest
from tokenizers import Tokenizer as HfTokenizer

import pipeline_cases as cases
from moesaic.core.errors import DataError
from moesaic.data.tokenizer import (
    SPECIALS,
    Tokenizer,
    encode_on_all_cores,
)


def test_ids_are_ordered_specials_languages_bytes_pieces():
    tokenizer = cases.tokenizer()
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIALS.values())
    assert tokenizer.vocabulary.roles == dict(zip(SPECIALS, range(5), strict=True))
    assert tokenizer.vocabulary.tags == dict(zip(cases.LANGUAGES, [5, 6, 7, 8], strict=True))
    assert [tokenizer.id_to_token(9), tokenizer.id_to_token(9 + 255)] == ["<0x00>", "<0xFF>"]
    assert tokenizer.languages == cases.LANGUAGES


def test_a_saved_tokenizer_loads_as_the_same_one(tmp_path):
    tokenizer, path = cases.tokenizer(), tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.languages == tokenizer.languages
    assert again.encode("<deu_Latn> aei 🙂") == tokenizer.encode("<deu_Latn> aei 🙂")


def test_the_file_is_read_by_hugging_face_tokenizers(tmp_path):
    cases.tokenizer().save(tmp_path / "tokenizer.json")
    inner = HfTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "aei oua 7"
    assert inner.encode(text).ids == cases.tokenizer().encode(text)
    assert inner.decode([5, *inner.encode(text).ids, cases.tokenizer().vocabulary.eos]) == text


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": '])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_foreign_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    other = HfTokenizer.from_str(
        cases.tokenizer()._hf_tokenizer.to_str().replace("<mask>", "[MASK]")
    )
    other.save(str(path))
    with pytest.raises(DataError, match="not written by moesaic"):
        Tokenizer.load(path)


def test_an_unknown_language_names_the_nearest():
    with pytest.raises(DataError, match='did you mean "deu_Latn"'):
        cases.tokenizer().vocabulary.tag("deu_latn")


def test_text_that_utf8_cannot_encode_is_an_error():
    with pytest.raises(DataError, match="cannot be encoded"):
        cases.tokenizer().encode("a\ud800")
    with pytest.raises(DataError, match="cannot be encoded"):
        cases.tokenizer().encode_batch(["a", "a\ud800"])


def test_forks_are_safe_after_parallel_encoding(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with encode_on_all_cores():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("truncation", {"max_length": 2, "strategy": "LongestFirst", "stride": 3}),
        ("padding", {"strategy": {"Fixed": 10**8}, "pad_id": 0, "pad_token": "<pad>"}),
        ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        ("model.dropout", 0.5),
        ("model.end_of_word_suffix", "x"),
    ],
)
def test_a_setting_that_changes_what_is_encoded_is_refused(tmp_path, setting, value):
    path = tmp_path / "tokenizer.json"
    cases.tokenizer().save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    place = content["model"] if setting.startswith("model.") else content
    place[setting.removeprefix("model.")] = value
    path.write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(DataError, match=f"tokenizer.json: {setting}: found .*expected null"):
        Tokenizer.load(path)


def test_an_id_without_a_row_in_the_embedding_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    cases.tokenizer().save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    content["model"]["vocab"][last] = 10**6
    path.write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(DataError, match="ids up to 1000000, expected each id from 0"):
        Tokenizer.load(path)


def test_a_file_over_the_limit_is_refused_unread(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)

    with pytest.raises(DataError, match="at most"):
        Tokenizer.load(path)
