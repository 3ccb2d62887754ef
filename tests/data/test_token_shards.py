"""Token shards: texts are read as encoded, and damaged files are named."""

import json
import shutil

import numpy as np
import pytest

import pipeline_cases as cases
from moesaic.core.errors import DataError
from moesaic.data.token_shards import DATA_FILES, TokenShards


def texts_of(numbers) -> list[str]:
    return [cases.tokenizer().decode(row) for row in cases.lists(cases.shards().gather(numbers))]


def test_pairs_are_read_as_in_the_corpus():
    rows = cases.shards().pair_rows("eng_Latn", "ell_Grek")
    source, target = rows.text_ids(np.arange(rows.size))
    assert rows.size == cases.SIZES["ell_Grek"]
    assert texts_of(source) == [cases.sentence("eng_Latn", i) for i in range(rows.size)]
    assert texts_of(target) == [cases.sentence("ell_Grek", i) for i in range(rows.size)]


def test_a_direction_can_be_read_in_reverse():
    forth = cases.shards().pair_rows("eng_Latn", "deu_Latn")
    back = cases.shards().pair_rows("deu_Latn", "eng_Latn")
    index = np.array([5, 0, 7])
    assert [a.tolist() for a in back.text_ids(index)] == [
        a.tolist() for a in forth.text_ids(index)[::-1]
    ]
    lengths = cases.shards().lengths(back.text_ids(np.arange(back.size))[1])
    assert back.num_tokens == lengths.sum()


def test_a_text_that_directions_share_is_stored_once():
    english = cases.shards().text_rows("eng_Latn")
    assert english.size == max(cases.SIZES.values())
    assert len(set(texts_of(np.arange(english.size) + english.start))) == english.size


def test_monolingual_texts_follow_those_of_pairs():
    greek = cases.shards().text_rows("ell_Grek")
    assert greek.size == cases.SIZES["ell_Grek"] + 20
    assert texts_of(greek.text_ids(np.array([greek.size - 1]))[0])[0].endswith("δ")
    lengths = cases.shards().lengths(np.arange(greek.size) + greek.start)
    assert greek.num_tokens == lengths.sum()


def test_joined_pairs_share_their_english():
    rows = cases.shards().pivot_rows("deu_Latn", "jpn_Jpan", pivot="eng_Latn", split="train")
    source, target = rows.text_ids(np.arange(rows.size))
    numbers = [text.split()[-1] for text in texts_of(source)]
    assert numbers == [text.split()[-1] for text in texts_of(target)]
    assert len(numbers) == cases.SIZES["jpn_Jpan"]


def test_a_split_without_rows_is_empty_and_an_unknown_direction_is_refused():
    assert cases.shards().pair_rows("eng_Latn", "deu_Latn", split="test").size == 0
    with pytest.raises(DataError, match=r"no pairs eng_Latn-fra_Latn .* did you mean"):
        cases.shards().pair_rows("eng_Latn", "fra_Latn")
    with pytest.raises(DataError, match='did you mean "deu_Latn"'):
        cases.shards().text_rows("deu_latn")


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_missing_shortened_or_altered_file_is_named(tmp_path, name):
    path = tmp_path / "shards"
    shutil.copytree(cases.shards().path, path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{name}: {len(content) - 1} bytes, expected"):
        TokenShards.open(path)
    (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    altered = "altered" if name == "tokens.bin" else "altered|expected offsets|a pair has text"
    with pytest.raises(DataError, match=f"{name}: ({altered})"):
        TokenShards.open(path).verify()
    (path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        TokenShards.open(path)


def test_no_shards_and_another_format_are_refused(tmp_path):
    with pytest.raises(DataError, match="no shards here"):
        TokenShards.open(tmp_path)
    (tmp_path / "shards.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="shard format 99, expected 1"):
        TokenShards.open(tmp_path)
