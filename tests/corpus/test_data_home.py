import sys
from pathlib import Path

import pytest

from moesaic.core.errors import DataError
from moesaic.corpus.data_home import corpora_dir, data_home, find_data_home, packages_dir


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_HOME", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "platform", "linux")


def test_the_variable_decides_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data/corpora").mkdir(parents=True)
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path / "set"))
    assert data_home() == tmp_path / "set"
    assert (corpora_dir(), packages_dir()) == (tmp_path / "set/corpora", tmp_path / "set/packages")


def test_a_tilde_in_the_variable_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/someone")
    monkeypatch.setenv("MOESAIC_HOME", "~/moesaic")
    assert data_home() == Path("/someone/moesaic")


@pytest.mark.parametrize("part", ["corpora", "packages", "shards"])
def test_data_of_moesaic_in_the_current_folder_is_used(part: str) -> None:
    Path("data", part).mkdir(parents=True)
    assert data_home() == Path("data")
    assert "this folder" in find_data_home().reason


def test_a_data_folder_of_somebody_else_is_left_alone() -> None:
    Path("data/pictures").mkdir(parents=True)
    assert data_home() != Path("data")


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"XDG_DATA_HOME": "/xdg"}, "/xdg/moesaic"),
        ("linux", {"XDG_DATA_HOME": ""}, "/someone/.local/share/moesaic"),
        ("linux", {"XDG_DATA_HOME": "relative"}, "/someone/.local/share/moesaic"),
        ("darwin", {}, "/someone/Library/Application Support/moesaic"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/moesaic"),
    ],
)
def test_else_it_is_in_the_data_folder_of_the_user(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("HOME", "/someone")
    for name, value in {"MOESAIC_HOME": "", **variables}.items():
        monkeypatch.setenv(name, value)
    assert data_home() == Path(expected)


def test_an_unknown_home_directory_is_an_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Path) -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "expanduser", fail)
    monkeypatch.setenv("XDG_DATA_HOME", "")
    with pytest.raises(DataError, match="set MOESAIC_HOME"):
        data_home()
