"""The command line, verb by verb: what it prints, what it refuses, and how it ends."""

import json
from pathlib import Path

import pytest

from moesaic.cli.main import VERBS, main

TINY = ["--set", "steps=12", "--set", "schedule.warmup=2", "--set", "validation.every=6"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MOESAIC_HOME", str(folder / "data"))
        main_ok(["train", "tiny", "--out", "runs/tiny", "--quiet", *TINY])
        yield folder


def main_ok(words):
    code = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    assert not code


def refused(words, capsys):
    """Run a verb that must end with exit code 2; return its error as one line."""
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_every_verb_has_help_with_an_example(capsys):
    for verb in VERBS:
        main_ok([verb, "--help"])
        out = capsys.readouterr().out
        assert "Example" in out or verb in ("data", "config", "bench"), verb


def test_subverbs_have_help_with_an_example(capsys):
    for words in (
        ["data", "build"],
        ["data", "stats"],
        ["data", "show"],
        ["config", "show"],
        ["bench", "layer"],
    ):
        main_ok([*words, "--help"])
        assert "Example" in capsys.readouterr().out, words


def test_without_a_verb_it_lists_them(capsys):
    main([])
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


def test_an_unknown_verb_names_the_nearest(capsys):
    assert 'did you mean "train"' in refused(["trian"], capsys)


def test_an_error_is_json_too_when_json_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "dmo", "--json"])
    assert "did you mean" in last_json(capsys)["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.dmi=3", ["model.dmi", 'did you mean "dim"']),
        ("model.dim=wide", ["model.dim", '"wide"', "whole number"]),
        ("model.norm=RMSNrm", ["model.norm", 'did you mean "RMSNorm"']),
        ("mixture.tasks=[{task: Translate}]", ["mixture.tasks.0.task", "Translation"]),
        ("model.dim=63", ["63", "heads"]),
        ("languages=[qzz]", ["qzz"]),
        ("steps", ["path=value"]),
    ],
)
def test_a_wrong_config_is_refused_with_path_and_way_out(change, words, capsys, home):
    said = refused(["train", "tiny", "--out", "runs/never", "--set", change], capsys)
    assert all(word in said for word in words), said
    assert not Path("runs/never/checkpoints").exists()


def test_explain_counts_what_the_model_has(capsys):
    main_ok(["explain", "tiny", "--json"])
    found = last_json(capsys)
    assert found["parameters"]["total"] == sum(found["parameters"]["by_part"].values())
    assert found["parameters"]["active"] < found["parameters"]["total"]
    assert found["bytes"]["weights"] == 4 * found["parameters"]["total"]


def test_explain_compares_a_preset_with_what_was_published(capsys):
    main_ok(["explain", "zcode-m3-64", "--json"])
    found = last_json(capsys)
    assert found["published"][0]["value"] == pytest.approx(1e10)
    assert "dim" in found["guessed"]


def test_config_show_prints_a_config_that_trains_the_same(capsys, tmp_path):
    main_ok(["config", "show", "tiny"])
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    main_ok(["config", "diff", "tiny", str(path)])
    assert capsys.readouterr().out == ""


def test_the_schema_is_json_with_every_family(capsys):
    main_ok(["config", "schema"])
    text = capsys.readouterr().out
    json.loads(text)
    assert all(kind in text for kind in ("TopK", "Dropless", "RMSNorm", "Muon", "Translation"))


def test_doctor_says_what_each_op_takes_and_why(capsys):
    main_ok(["doctor", "--json"])
    picks = last_json(capsys)["picks"]
    assert {p["op"] for p in picks} >= {"experts", "attention"}
    assert all(p["why"] for p in picks)


def test_data_verbs_build_count_and_show(capsys, home):
    main_ok(["data", "stats", "synthetic", "--json"])
    assert last_json(capsys)["pairs"] == 6000
    main_ok(["data", "show", "synthetic", "--to", "qab", "-n", "3", "--json"])
    assert len(last_json(capsys)["pairs"]) == 3


def test_a_corpus_that_is_not_there_is_named(capsys, home):
    assert "moesaic data build catalogues" in refused(["data", "stats", "catalogues"], capsys)
    assert "synthetic" in refused(["data", "stats", "synthetc"], capsys)


def test_translate_keeps_order_and_empty_lines(capsys, home):
    Path("in.txt").write_text("Open the new file here\n\nDelete the hidden page now\n")
    main_ok(["translate", "runs/tiny", "in.txt", "--to", "qaa", "--beam", "1"])
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4
    assert lines[1] == ""


def test_translate_gives_n_best_with_scores(capsys, home):
    Path("one.txt").write_text("Open the new file here\n")
    main_ok(["translate", "runs/tiny", "one.txt", "--to", "qaa", "--n-best", "3", "--json"])
    (row,) = last_json(capsys)["translations"]
    scores = [a["score"] for a in row["alternatives"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_translate_refuses_a_language_the_model_lacks(capsys, home):
    Path("one.txt").write_text("Open\n")
    said = refused(["translate", "runs/tiny", "one.txt", "--to", "fr"], capsys)
    assert "fra_Latn" in said
    assert "qaa_Latn" in said


def test_eval_writes_scores_routes_and_a_report(capsys, home):
    main_ok(["eval", "runs/tiny", "--limit", "5", "--resamples", "20", "--json"])
    found = last_json(capsys)
    assert set(found["languages"]) == {"qaa_Latn", "qab_Cyrl", "qac_Grek"}
    for result in found["languages"].values():
        assert {"model", "copy", "memory"} <= set(result)
    assert json.loads(Path("runs/tiny/summary.json").read_text())["mean"] == found["mean"]
    assert "<html" in Path("runs/tiny/report.html").read_text()
    assert Path("runs/tiny/routes.json").is_file()


def test_eval_reads_a_test_set_of_ones_own(capsys, home):
    Path("mine.tsv").write_text("Open the file\tTopoba\nClose it\tSezoga\n")
    before = Path("runs/tiny/routes.json").read_bytes()
    main_ok(["eval", "runs/tiny", "--pairs", "mine.tsv", "--to", "qaa", "--json"])
    assert last_json(capsys)["languages"]["qaa_Latn"]["count"] == 2
    assert Path("runs/tiny/routes.json").read_bytes() == before


def test_a_run_that_is_there_is_not_overwritten(capsys, home):
    said = refused(["train", "tiny", "--out", "runs/tiny", *TINY], capsys)
    assert "--resume auto" in said


def test_a_run_goes_on_from_its_directory_alone(capsys, home):
    main_ok(["train", "tiny", "--out", "runs/two", "--quiet", "--until", "6", *TINY])
    capsys.readouterr()
    main_ok(["train", "--resume", "runs/two", "--quiet", "--json"])
    found = last_json(capsys)
    assert found["steps"] == 12
    assert found["stopped"] == "finished"


def test_an_altered_checkpoint_is_named_and_the_one_before_is_taken(capsys, home):
    settings = [*TINY, "--set", "checkpoint.every=3"]
    main_ok(["train", "tiny", "--out", "runs/hurt", "--quiet", "--until", "6", *settings])
    capsys.readouterr()
    newest = Path("runs/hurt/checkpoints/step-00000006/model.safetensors")
    newest.write_bytes(newest.read_bytes()[:-5])
    main_ok(["train", "--resume", "runs/hurt", "--json"])
    captured = capsys.readouterr()
    assert "model.safetensors" in captured.err
    assert json.loads(captured.out.strip().splitlines()[-1])["steps"] == 12


def test_the_demo_verb_does_the_whole_job(capsys, home):
    main_ok(["demo", "--recipe", "tiny", "--out", "runs/demo", "--json", *TINY])
    found = last_json(capsys)
    assert set(found["seconds"]) >= {"data", "train", "evaluate"}
    assert found["counts"]["train_tokens"] > 0
    assert "moesaic" in found["versions"]
    assert Path(found["report"]).is_file()


def test_a_file_of_ones_own_that_is_missing_is_named(capsys):
    assert "mine.py" in refused(["explain", "tiny", "--use", "mine.py"], capsys)


def test_eval_takes_two_aligned_files_and_a_limit(capsys, home):
    Path("mine.en").write_text("Open the file\nClose it\nSave it\n")
    Path("mine.qaa").write_text("Topoba\nSezoga\nFefupi\n")
    words = ["--moses", "mine.en", "mine.qaa", "--to", "qaa", "--limit", "2", "--json"]
    main_ok(["eval", "runs/tiny", *words])
    result = last_json(capsys)["languages"]["qaa_Latn"]
    assert (result["count"], result["of"]) == (2, 3)
