"""Names, errors and paths are never markup, and control characters never reach a terminal raw."""

import io

import pytest
from rich.console import Console

from moesaic.cli.main import COMMANDS, main
from moesaic.cli.shared_options import make_console, print_table, show_error
from moesaic.cli.styled_text import styled

NAMES = [
    "[bold]x",
    "[/red]",
    r"\[/red]",
    "\\[/",
    "a[/]b\\",
    ":smile:",
    "{name}",
    "x\x1b[31my",
]


def plain(name):
    return name.replace("\x1b", "\\x1b")


@pytest.mark.parametrize("name", NAMES)
def test_a_value_is_shown_as_it_is(name):
    text = styled("[bold]{name}[/]: {count:,} of {name}", name=name, count=1234)
    assert text.plain == f"{plain(name)}: 1,234 of {plain(name)}"
    console = Console(file=io.StringIO(), width=200)
    print_table(console, ("a", name), [(name, "b")], title=name)
    assert console.file.getvalue().count(plain(name)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_console_of_a_command_prints_a_text_as_it_is(name, capsys):
    make_console().print(f"page: {name}", name)
    assert capsys.readouterr().out == f"page: {plain(name)} {plain(name)}\n"


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_shown_as_it_is(name, capsys):
    show_error(f"{name}: there is no such file")
    assert f"error: {plain(name)}: there" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_a_hostile_word_for_markup(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("[/red]", r"\[/red]", "[bold]x"):
        for words in ([command, word], [command, "--set", f"name={word}", "--out", word], [word]):
            with pytest.raises(SystemExit) as end:
                main(words)
            assert end.value.code == 2, words
            assert "error: " in capsys.readouterr().err


def test_a_pipe_is_neither_folded_nor_cut(capsys):
    console = make_console()
    print_table(console, ("name", "n"), [("layer." * 60, "1")])
    assert "layer." * 60 in capsys.readouterr().out
