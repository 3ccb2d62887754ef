from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.corpus_stats import (
    DroppedFilter,
    corpus_stats,
    sample_dropped,
    sample_pairs,
)
from moesaic.corpus.sources.local_files import LocalFile, LocalFiles
from moesaic.corpus.split import SplitConfig


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rows = [f"open the {'x' * i}\töffne {'x' * i}" for i in range(1, 30)]
    (tmp_path / "a.tsv").write_text("\n".join([*rows, "same\tsame", rows[0]]))
    source = LocalFiles(files=(LocalFile(path=str(tmp_path / "a.tsv"), source="en", target="de"),))
    what = CorpusRecipe(name="a", source=source, split=SplitConfig(test=0, valid=0))
    return build_corpus(what, out=tmp_path / "c")


def test_statistics_add_up(corpus: Corpus) -> None:
    found = corpus_stats(corpus)
    [german] = found.directions
    assert found.read == 31
    assert found.kept == german.kept == german.splits["train"].pairs == 29
    assert found.dropped == {"untranslated": 1, "duplicate": 1}
    assert set(found.dropped) <= set(found.reasons)
    assert german.splits["train"].source_words == 29 * 3
    assert german.splits["train"].target_characters == 29 * 6 + sum(range(1, 30))


def test_a_sample_is_drawn_from_the_corpus_and_repeats_with_its_seed(corpus: Corpus) -> None:
    drawn = sample_pairs(corpus, source="en", target="de", count=5, seed=1)
    assert len(drawn) == 5
    assert set(drawn) <= set(corpus.iter_pairs("en", "de"))
    assert drawn == sample_pairs(corpus, source="en", target="de", count=5, seed=1)
    assert drawn != sample_pairs(corpus, source="en", target="de", count=5, seed=2)
    assert len(sample_pairs(corpus, source="de", target="en", count=99)) == 29


def test_an_empty_split_is_named(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="no test pairs from en to de"):
        sample_pairs(corpus, source="en", target="de", split="test")


def test_a_corpus_of_text_alone_has_counts(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("Die Tür\n\u200b\nDas Haus\nCaf\ufffd\n", encoding="utf-8")
    source = LocalFiles(files=(LocalFile(path=str(tmp_path / "de.txt"), language="de"),))
    found = corpus_stats(build_corpus(CorpusRecipe(name="t", source=source), out=tmp_path / "c"))
    german = found.texts["deu_Latn"]
    assert (german.rows_read, german.kept, german.dropped) == (4, 2, {"broken": 1, "empty": 1})
    assert found.dropped == german.dropped


def test_dropped_rows_are_chosen_by_reason_and_language(corpus: Corpus) -> None:
    [row] = sample_dropped(corpus, DroppedFilter("untranslated"), count=5)
    assert (row.source, row.target) == ("same", "same")
    assert sample_dropped(corpus, DroppedFilter(target="fra_Latn"), count=5) == []
    assert len(sample_dropped(corpus, DroppedFilter(source="eng_Latn"), count=5)) == 2


def test_empty_splits_are_named_with_their_directions(corpus: Corpus) -> None:
    valid, test = corpus.describe_empty_splits()
    assert "no valid pairs of eng_Latn-deu_Latn" in valid
    assert "nothing to score on (of 1 directions)" in test
