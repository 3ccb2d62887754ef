from collections import Counter

import numpy as np
import pytest

from moesaic.core.errors import DataError
from moesaic.evaluate import baselines
from moesaic.evaluate.baselines import TranslationMemory, TranslationMemorySystem, copy_source

WORDS = "open|file|close|window|save|print|all|new|copy|paste|undo|Größe|файл|打开|文件|%s|..."


def _texts(count, seed):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS.split("|"), random.integers(1, 8))) for _ in range(count)]


def _plain_similarities(sources, query):
    """The definition: cosine of tf-idf vectors of character 1- to 4-grams."""

    def grams(text):
        padded = f" {' '.join(text.casefold().split())} "
        return Counter(padded[i : i + n] for n in (1, 2, 3, 4) for i in range(len(padded) - n + 1))

    bags = [grams(s) for s in sources]
    documents = Counter(g for bag in bags for g in bag)

    def vector(bag):
        found = {g: c * np.log((2 + len(sources)) / (1 + documents[g])) for g, c in bag.items()}
        norm = np.sqrt(sum(v * v for v in found.values()))
        return {g: v / norm for g, v in found.items()}

    asked = vector(grams(query))
    return [sum(v * asked.get(g, 0.0) for g, v in vector(bag).items()) for bag in bags]


@pytest.mark.parametrize("chunk", [20_000, 7])
@pytest.mark.parametrize("common", [1 / 8, 0.0, 10.0])
def test_the_pruned_search_finds_what_a_full_search_finds(monkeypatch, chunk, common):
    monkeypatch.setattr(baselines, "_CHUNK_SIZE", chunk)
    monkeypatch.setattr(baselines, "_COMMON_FRACTION", common)
    sources = _texts(120, seed=1)
    memory = TranslationMemory(sources, targets=[str(i) for i in range(120)])
    queries = [*_texts(25, seed=2), "a new word: zzzz"]
    for query, match in zip(queries, memory.find(queries), strict=True):
        every = _plain_similarities(sources, query)
        assert match.similarity == pytest.approx(max(every), abs=1e-3)
        assert every[match.index] == pytest.approx(max(every), abs=1e-3)


def test_a_memory_finds_what_it_holds():
    sources = sorted(set(_texts(100, seed=3)))
    memory = TranslationMemory(sources, targets=[s.upper() for s in sources])
    found = memory.find(sources)
    assert [m.target for m in found] == [s.upper() for s in sources]
    assert min(m.similarity for m in found) > 0.999


def test_ties_go_to_the_earlier_pair_and_case_and_spaces_do_not_count():
    memory = TranslationMemory(["Save  File", "save file", "x"], targets=["a", "b", "c"])
    assert memory.find(["SAVE FILE"])[0].index == 0


def test_nothing_shared_gives_an_empty_match():
    memory = TranslationMemory(["abc", "abd"], targets=["1", "2"])
    match = memory.find(["漢字"])[0]
    assert match.similarity < 0.2
    assert memory.find([]) == []


def test_lone_surrogates_and_empty_lines_do_not_stop_it():
    memory = TranslationMemory(["", "abc \ud800"], targets=["", "x"])
    assert len(memory.find(["", "\ud800", "abc"])) == 3


def test_a_memory_without_pairs_is_refused():
    with pytest.raises(DataError, match="at least one"):
        TranslationMemory([], targets=[])
    with pytest.raises(DataError, match="2 sources and 1 targets"):
        TranslationMemory(["a", "b"], targets=["a"])


def test_a_memory_system_holds_one_direction_and_survives_an_empty_one():
    asked = []

    def pairs(source, target):
        asked.append(target)
        return iter([] if target == "fra_Latn" else [("open", f"{target} open")])

    system = TranslationMemorySystem(pairs)
    assert system(["open", "open"], source="eng_Latn", target="deu_Latn") == ["deu_Latn open"] * 2
    system(["open"], source="eng_Latn", target="deu_Latn")
    assert system(["open"], source="eng_Latn", target="fra_Latn") == [""]
    assert asked == ["deu_Latn", "fra_Latn"]


def test_copying_copies():
    assert copy_source(["a", ""], source="x", target="y") == ["a", ""]
