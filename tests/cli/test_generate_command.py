"""``moesaic generate`` on a model with random weights: its streams and refusals."""

import io
import json
import sys

import pytest

from moesaic.cli.main import main
from serve.language_model_run import write_language_model_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(write_language_model_run(tmp_path_factory.mktemp("runs") / "small").path)


def generate(*words: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["generate", *words, "--max-tokens", "12"])


def answer(words, capsys) -> dict:
    generate(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_a_prompt_is_an_argument_a_file_or_standard_input(run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("the end\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the end\n"), encoding="utf-8"))
    found = [
        answer([run, *words], capsys)["texts"]
        for words in (["the end\n"], ["--file", str(file)], ["--stdin"])
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0]["num_tokens"] == 12


def test_a_terminal_shows_the_same_text_as_it_is_generated(run, capsys, monkeypatch):
    words = [run, "an end", "--top-k", "5"]
    generate(*words)
    whole = capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate(*words)
    streamed = capsys.readouterr()
    assert streamed.out == whole.out
    assert whole.out.startswith("an end")
    assert "cut off after 12 tokens" in whole.err
    generate(*words, "--num-samples", "3")
    texts = capsys.readouterr().out.split("\n----\n")
    assert len(texts) == 3
    assert texts[0] + "\n" == whole.out


def test_a_stop_string_may_be_a_new_line(run, capsys):
    found = answer([run, "an end", "--stop", r"\n", "--stop", " ", "--seed", "3"], capsys)
    assert not {"\n", " "} & set(found["texts"][0]["text"])
    assert found["search"]["seed"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--stdin"], "one prompt is continued, but PROMPT and --stdin are given"),
        (["--file", "no-such.txt"], "no-such.txt"),
        (["x", "--in", "fr"], "no language"),
        (["x", "--top-p", "2"], "top_p"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(run, words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", run, *words])
    assert message in capsys.readouterr().err


def test_a_language_model_does_not_translate(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["translate", run, "--to", "de"])
    assert "is a language model" in capsys.readouterr().err
