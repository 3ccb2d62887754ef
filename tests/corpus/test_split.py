import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ConfigError
from moesaic.corpus.split import HeldOutDomain, SplitConfig, split_key


@pytest.mark.parametrize(
    "twin", ["save  THE file!", "Save the file 2", "Save the file: %s", "Save the {name} file"]
)
def test_sources_that_differ_in_no_letter_fall_into_one_split(twin: str) -> None:
    for salt in map(str, range(20)):
        split = SplitConfig(test=0.3, valid=0.3, salt=salt)
        assert split.split_of(twin) == split.split_of("Save the file")


def test_vowel_signs_distinguish_sources() -> None:
    assert split_key("कि") != split_key("की")


def test_splits_have_their_fractions() -> None:
    texts = [
        f"text {chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(9000)
    ]
    drawn = [SplitConfig(test=0.2, valid=0.1).split_of(t) for t in texts]
    assert drawn.count("test") / len(texts) == pytest.approx(0.2, abs=0.02)
    assert drawn.count("valid") / len(texts) == pytest.approx(0.1, abs=0.02)


@settings(deadline=None)
@given(st.text())
def test_any_text_has_a_split(text: str) -> None:
    assert SplitConfig().split_of(text) in ("train", "valid", "test")


def test_a_split_without_train_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        SplitConfig.from_dict({"test": 0.6, "valid": 0.4})


def test_a_domain_contains_the_packages_that_match_its_patterns() -> None:
    games = HeldOutDomain(name="games", packages=("wesnoth-*", "tux"))
    split = SplitConfig(domains=(games, HeldOutDomain(name="office", packages=("*-help",))))
    found = {
        o: split.domain_of(o) for o in ("wesnoth-1.16-data", "tux", "tuxed", "my-help", "gimp")
    }
    assert found == {
        "wesnoth-1.16-data": "games",
        "tux": "games",
        "tuxed": "",
        "my-help": "office",
        "gimp": "",
    }


@pytest.mark.parametrize("names", [("train",), ("games", "games")])
def test_two_splits_of_one_name_are_refused(names: tuple[str, ...]) -> None:
    domains = [{"name": name, "packages": ["a"]} for name in names]
    with pytest.raises(ConfigError, match=f"two splits have the name {names[0]}"):
        SplitConfig.from_dict({"domains": domains})
