import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from similarity import jaccard

from moesaic.core.errors import ConfigError
from moesaic.corpus.split import (
    DropNearDuplicates,
    KeepNearDuplicates,
    SplitConfig,
    character_trigrams,
)

WORDS = ["open", "opens", "close", "file", "files", "the", "a", "page", "pages", "in", ""]
texts = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


def by_definition(held: set[str], train: list[str], threshold: float) -> set[str]:
    return {h for h in held if any(jaccard(h, t) >= threshold for t in train)}


@settings(deadline=None, max_examples=150)
@given(
    st.sets(texts, max_size=25),
    st.lists(texts, max_size=40),
    st.sampled_from([0.2, 0.5, 0.6, 0.75, 0.9, 1.0]),
)
def test_the_index_finds_what_comparing_every_pair_finds(
    held: set[str], train: list[str], threshold: float
) -> None:
    assert DropNearDuplicates(threshold=threshold).find(held, train=train) == by_definition(
        held, train, threshold
    )


def test_jaccard_is_shared_trigrams_over_all_trigrams() -> None:
    assert character_trigrams("ab") == {" ab", "ab "}
    assert character_trigrams("") == {"  "}
    assert jaccard("open the file", "open the file") == 1
    assert jaccard("abcd", "abce") == 2 / 6
    assert jaccard("abc", "xyz") == 0


def test_one_letter_more_is_near_and_another_word_is_not() -> None:
    held = {"delete the selected files", "print the selected page"}
    found = DropNearDuplicates(threshold=0.6).find(held, train=iter(["delete the selected file"]))
    assert found == {"delete the selected files"}


def test_the_threshold_itself_is_near() -> None:
    assert jaccard("abcdef", "abcdex") == 4 / 8
    assert DropNearDuplicates(threshold=0.5).find({"abcdef"}, train=["abcdex"]) == {"abcdef"}
    assert DropNearDuplicates(threshold=0.51).find({"abcdef"}, train=["abcdex"]) == frozenset()


def test_keeping_finds_no_near_duplicates() -> None:
    assert not KeepNearDuplicates().enabled
    assert KeepNearDuplicates().find({"a"}, train=["a"]) == frozenset()
    assert DropNearDuplicates().find({"a"}, train=["a"]) == {"a"}


def test_near_duplicates_are_configured_in_a_recipe() -> None:
    split = SplitConfig.from_dict(
        {"near_duplicates": {"kind": "DropNearDuplicates", "threshold": 0.8}}
    )
    assert split.near_duplicates == DropNearDuplicates(threshold=0.8)
    with pytest.raises(ConfigError, match="threshold"):
        SplitConfig.from_dict({"near_duplicates": {"kind": "DropNearDuplicates", "threshold": 0}})
