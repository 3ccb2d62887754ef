import pytest

from moesaic.core.errors import DataError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.join_pairs import can_be_read, pairs_of_direction, pivots
from moesaic.corpus.sources.local_files import LocalFile, LocalFiles
from moesaic.corpus.split import SplitConfig

WORDS = ("open", "close", "save", "print")
SIDES = ("eng_Latn", "deu_Latn"), ("eng_Latn", "fra_Latn"), ("fra_Latn", "spa_Latn")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    files = []
    for source, target in SIDES:
        path = root / f"{source}-{target}.tsv"
        path.write_text("".join(f"{word} {source}\t{word} {target}\n" for word in WORDS))
        files.append(LocalFile(path=str(path), source=source, target=target))
    recipe = CorpusRecipe(
        name="c", source=LocalFiles(files=tuple(files)), split=SplitConfig(test=0, valid=0)
    )
    return build_corpus(recipe, out=root / "c")


def rows(corpus: Corpus, source: str, target: str) -> set[tuple[str, str]]:
    pairs = pairs_of_direction(corpus, source, target, split="train")
    return {(pair.source, pair.target) for pair in pairs}


def test_two_languages_are_joined_by_those_that_have_pairs_with_both(corpus: Corpus) -> None:
    assert pivots(corpus, "deu_Latn", "fra_Latn") == ["eng_Latn"]
    assert pivots(corpus, "spa_Latn", "eng_Latn") == ["fra_Latn"]
    expected = {(f"{word} deu_Latn", f"{word} fra_Latn") for word in WORDS}
    assert rows(corpus, "de", "fr") == expected


@pytest.mark.parametrize(("source", "target"), [("eng_Latn", "deu_Latn"), ("deu_Latn", "eng_Latn")])
def test_a_stored_direction_is_read_as_it_is(corpus: Corpus, source: str, target: str) -> None:
    assert rows(corpus, source, target) == {(f"{w} {source}", f"{w} {target}") for w in WORDS}


def test_languages_without_a_common_third_cannot_be_joined(corpus: Corpus) -> None:
    assert not can_be_read(corpus, "de", "es")
    with pytest.raises(DataError):
        rows(corpus, "de", "es")
