import pytest

from moesaic.core.errors import DataError
from moesaic.corpus.pair import Pair
from moesaic.evaluate.testset import make_testset, read_moses_testset, read_testset


def test_a_limit_keeps_the_same_sentences_every_time():
    pairs = [Pair(f"s{i}", f"t{i}", "eng_Latn", "deu_Latn") for i in range(50)]
    found = [make_testset(pairs, name="x", source="en", target="de", limit=7) for _ in range(2)]
    assert found[0] == found[1]
    assert (len(found[0]), found[0].total_count) == (7, 50)
    assert found[0].target == "deu_Latn"
    assert all(s[1:] == t[1:] for s, t in zip(found[0].sources, found[0].references, strict=True))


def test_a_tsv_file_is_a_test_set(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("Open\tÖffnen\nClose\tSchließen\n", encoding="utf-8")
    found = read_testset(path, source="en", target="de")
    assert found.sources == ("Open", "Close")
    assert found.name == "pairs.tsv"


def test_moses_files_are_read_line_against_line(tmp_path):
    (tmp_path / "a").write_text("Open\nClose\n", encoding="utf-8")
    (tmp_path / "b").write_text("Öffnen\nSchließen\n", encoding="utf-8")
    found = read_moses_testset(tmp_path / "a", tmp_path / "b", source="en", target="de")
    assert found.references == ("Öffnen", "Schließen")
    (tmp_path / "b").write_text("Öffnen\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 lines"):
        read_moses_testset(tmp_path / "a", tmp_path / "b", source="en", target="de")


def test_a_test_set_without_sentences_is_refused():
    with pytest.raises(DataError, match="no sentences"):
        make_testset([], name="mine", source="en", target="de")
