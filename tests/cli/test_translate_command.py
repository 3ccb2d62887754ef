"""``moesaic translate`` on a model with random weights: its streams, notes and refusals."""

import io
import json
import sys

import pytest
import torch
import yaml

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.checkpoint.trained_directions import TrainedDirections, TrainedStream
from moesaic.cli.main import main
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig

LINES = ["Open the file", "", "Save\u2028all", "Close\x0call\x85now", "Yes\r", "\u200b"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("runs") / "small")
    run.path.mkdir()
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=320,
        dim=8,
        encoder=Stack(layers=1, moe_every=0),
        decoder=Stack(layers=1, moe_every=0),
        attention=AttentionConfig(heads=1),
        feed_forward=FeedForwardConfig(hidden=8),
    )
    loader = {"max_source": 16, "max_target": 8}
    run.config.write_text(yaml.safe_dump({"model": config.to_dict(), "data": {"loader": loader}}))
    write_tensors(run.model, tensors=export_weights(Transformer(config)))
    train_tokenizer(
        {"eng_Latn": ["Open the file", "Save all now", "Yes"]},
        languages=("eng_Latn", "deu_Latn", "fra_Latn"),
        config=TrainedTokenizer(vocab_size=320),
    ).save(run.tokenizer)
    stream = TrainedStream(
        task="t",
        source="fra_Latn",
        target="deu_Latn",
        rows=9,
        valid_rows=0,
        test_rows=0,
        share=1.0,
    )
    TrainedDirections(corpus="c", fingerprint="f", streams=(stream,)).write(run.directions)
    return str(run.path)


def _translate(words, monkeypatch, *, stdin=None):
    given = "\n".join(LINES).encode() + b"\n" if stdin is None else stdin
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
    code = 0
    try:
        main(["translate", *words])
    except SystemExit as end:
        code = end.code
    return code or 0


def test_a_file_and_standard_input_have_as_many_lines_out_as_in(run, monkeypatch, capsys, tmp_path):
    assert _translate([run, "--to", "de"], monkeypatch) == 0
    from_stdin = capsys.readouterr().out
    path = tmp_path / "in.txt"
    path.write_bytes("\n".join(LINES).encode() + b"\n")
    assert _translate([run, str(path), "--to", "de"], monkeypatch) == 0
    assert capsys.readouterr().out == from_stdin
    found = from_stdin.split("\n")
    assert len(found) == len(LINES) + 1
    assert [i for i, line in enumerate(found[:-1]) if not line] == [1, 5]


def test_a_line_that_is_not_utf8_is_named(run, monkeypatch, capsys):
    assert _translate([run, "--to", "de"], monkeypatch, stdin=b"one\ntwo \xe9\n") == 2
    assert "standard input, line 2: not UTF-8" in capsys.readouterr().err


def test_closed_standard_input_is_empty_input(run, monkeypatch, capsys):
    assert _translate([run, "--to", "de"], monkeypatch, stdin=b"") == 0
    assert capsys.readouterr().out == ""


def test_standard_input_may_be_replaced_by_one_without_bytes(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Open\u2028the file\nSave\n"))
    with pytest.raises(SystemExit) as end:
        main(["translate", run, "--to", "de"])
    assert end.value.code == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_what_became_of_lines_is_noted_beside_the_output(run, monkeypatch, capsys):
    long = b"Open the file. Save all now! " * 6 + b"\nYes\n"
    assert _translate([run, "--to", "de", "--json"], monkeypatch, stdin=long) == 0
    found = capsys.readouterr()
    value = json.loads(found.out)
    assert value["translations"][0]["parts"] > 1
    assert value["translations"][0]["trained"] is True  # from French, the only one trained
    assert any("line 1 (1 of 2)" in note and "in parts" in note for note in value["notes"])
    assert all(note in found.err for note in value["notes"])


def test_a_direction_that_was_not_trained_is_noted_before_anything_is_read(
    run, monkeypatch, capsys
):
    for words in (["--to", "de", "--from", "en"], ["--to", "fr"], ["--to", "en", "--from", "de"]):
        assert _translate([run, *words], monkeypatch, stdin=b"\xff") == 2
        assert "trained to translate" in capsys.readouterr().err


def test_a_language_that_the_model_does_not_have_is_refused(run, monkeypatch, capsys):
    for words in (["--to", "it"], ["--to", "de", "--from", "it"]):
        assert _translate([run, *words], monkeypatch) == 2
        assert "no language" in capsys.readouterr().err


def test_n_best_lines_are_not_wrapped(run, monkeypatch, capsys):
    assert _translate([run, "--to", "de", "--n-best", "6"], monkeypatch, stdin=b"Open\n") == 0
    best, *others = capsys.readouterr().out.splitlines()
    assert len(others) == 6
    assert others[0].split(maxsplit=1)[1:] == ([best] if best else [])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--n-best", "5", "--beam", "2"], "--n-best 5 needs a beam of at least 5, found --beam 2"),
        (["--early-stopping", "maybe"], "expected true, false or never"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--repetition-penalty", "nan"], "repetition_penalty"),
        (["--length-penalty", "nan"], "length"),
        (["--length-penalty", "-1"], "length"),
        (["--no-repeat-ngram", "-1"], "no-repeat-ngram"),
        (["a.po"], "a.po: no such file"),
    ],
)
def test_options_that_contradict_are_refused(run, monkeypatch, capsys, words, reason):
    assert _translate([run, "--to", "de", *words], monkeypatch, stdin=b"Open\n") == 2
    assert reason in capsys.readouterr().err


def test_a_file_of_another_format_is_refused_unless_it_is_called_text(
    run, monkeypatch, capsys, tmp_path
):
    path = tmp_path / "x.srt"
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nOpen\n")
    for words, stdin in (([str(path)], b""), ([], path.read_bytes())):
        assert _translate([run, *words, "--to", "de"], monkeypatch, stdin=stdin) == 2
        assert "subtitle" in capsys.readouterr().err
        assert _translate([run, *words, "--to", "de", "--as-text"], monkeypatch, stdin=stdin) == 0
        assert capsys.readouterr().out.count("\n") == 3
