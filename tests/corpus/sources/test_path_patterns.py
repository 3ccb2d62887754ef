from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.core.errors import UserError
from moesaic.corpus.sources import path_patterns
from moesaic.corpus.sources.path_patterns import find_matches, is_pattern


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


@pytest.mark.parametrize(
    ("pattern", "path", "codes"),
    [
        ("{lang}.po", "zh_TW.po", {"lang": "zho_Hant"}),
        ("{source}-{target}.tsv", "pt-BR-en.tsv", {"source": "por_Latn_BR", "target": "eng_Latn"}),
        ("{source}-{target}.tsv", "en-pt-BR.tsv", {"source": "eng_Latn", "target": "por_Latn_BR"}),
        ("{source}-{target}.*", "zh-TW-pt-BR.tsv", {"source": "zho_Hant", "target": "por_Latn_BR"}),
        ("*_{lang}.po", "app_pt_BR.po", {"lang": "por_Latn_BR"}),
        ("**/{lang}/*.po", "a/b/de/x.po", {"lang": "deu_Latn"}),
        ("**/{lang}.po", "de.po", {"lang": "deu_Latn"}),
        ("x/{lang}/m.{lang}.po", "x/de/m.de.po", {"lang": "deu_Latn"}),
        ("deu_Lat[mn]/f?.po", "deu_Latn/f1.po", {}),
        ("text/{lang}.txt", "text/German.txt", {"lang": "deu_Latn"}),
    ],
)
def test_a_path_gives_its_languages(pattern: str, path: str, codes: dict[str, str]) -> None:
    touch(path)
    [found] = find_matches(pattern)
    assert (str(found.path), found.languages, found.problem) == (path, codes, "")


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*{lang}.po", "default.po"),
        ("x/{lang}/m.{lang}.po", "x/de/m.fr.po"),
        ("*.po", "in/a.po"),
        ("[!a].po", "a.po"),
        ("[z-a].po", "a.po"),
        ("{lang}.po", ".de.po"),
    ],
)
def test_a_path_that_only_looks_alike_is_not_matched(pattern: str, path: str) -> None:
    touch(path)
    assert not [found for found in find_matches(pattern) if not found.problem]


@pytest.mark.parametrize("name", ["fr_CA", "qq", "messages"])
def test_a_file_of_no_known_language_is_found_with_its_problem(name: str) -> None:
    touch(f"{name}.po")
    [found] = find_matches("{lang}.po")
    assert name in found.problem


def test_a_name_that_can_be_read_in_two_ways_is_refused() -> None:
    touch("en-deu-Latn.tsv".replace("Latn", "fr"))
    with pytest.raises(UserError, match="can be read as"):
        find_matches("*{source}-{target}*.tsv")


def test_a_file_of_exactly_that_name_is_no_pattern() -> None:
    touch("a[1].tsv")
    assert not is_pattern("a[1].tsv")
    assert is_pattern("a[2].tsv")


@pytest.mark.parametrize("pattern", ["*.po", "**/*.po"])
def test_a_pattern_that_finds_too_much_is_refused(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_patterns, "MAX_FOUND_FILES", 3)
    for number in range(5):
        touch(f"{number}.po")
    with pytest.raises(UserError, match="more than 3 files; narrow"):
        find_matches(pattern)


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.text(st.sampled_from("*?[]{}!-^\\ab.\0é"), max_size=10),
    st.lists(
        st.sampled_from(["{lang}", "{source}", "**/", "*", "de", "a/", "[a", "."]), max_size=6
    ),
)
def test_any_pattern_finds_files_or_is_refused_with_a_sentence(odd: str, parts: list[str]) -> None:
    for path in ("de.po", "a/de.po", "a/b/fr.po"):
        touch(path)
    with suppress(UserError):
        for found in find_matches(odd + "".join(parts)):
            assert found.path.is_file()


def test_matching_takes_bounded_time_and_patterns_have_bounded_length() -> None:
    touch("a" * 200 + ".po")
    assert find_matches("*a" * 40 + "b.po") == []
    assert len(find_matches("*a" * 40 + "*.po")) == 1
    with pytest.raises(UserError, match="wildcards"):
        find_matches("*a" * 80)
