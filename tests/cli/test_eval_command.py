"""What the commands score: the directions that were trained, wherever the run lies."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.trained_directions import read_trained_directions
from moesaic.cli.evaluated_run import EvaluatedRun
from moesaic.cli.main import main
from moesaic.distributed.world import SingleProcess
from moesaic.recipes.lookup import find_recipe
from moesaic.train.training_data import Preparation

TINY = [
    *("--quiet", "--set", "steps=2", "--set", "schedule.warmup=1", "--set", "checkpoint.every=1"),
    *("--set", "data.tokenizer.vocab_size=320", "--set", "model.vocab_size=320"),
    *("--set", "data.loader.batch_tokens=256"),
]
NOUNS = ("Tür", "Brücke", "Mühle", "Bühne", "Lücke", "Küste")
VERBS = ("fällt", "läuft", "hört", "glüht")


def sentences(language, count=60):
    """Return parallel made-up sentences, one per number."""
    words = {"de": "Die {noun} {verb} im Jahr {n}", "fr": "La {noun} {verb} en l'an {n} déjà"}
    words |= {"en": "The {noun} {verb} in year {n}", "it": "Il {noun} {verb} nel anno {n}"}
    combinations = [(a, b, c) for c in "abcdefghijklm" for a in NOUNS for b in VERBS]
    return [
        words[language].format(noun=noun + letter, verb=verb, n=letter * 2)
        for noun, verb, letter in combinations[:count]
    ]


def build(name, pairs, capsys):
    """Build the corpus ``name`` of (source, target, rows) and return the --set of it."""
    files = []
    for source, target, count in pairs:
        rows = zip(sentences(source, count), sentences(target, count), strict=True)
        path = Path(f"{name}-{source}-{target}.tsv")
        path.write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")
        files.append(f"    - {{path: {path}, source: {source}, target: {target}}}")
    recipe = f"name: {name}\nsource:\n  kind: LocalFiles\n  files:\n" + "\n".join(files) + "\n"
    Path(f"{name}.yaml").write_text(recipe)
    run(["data", "build", f"{name}.yaml", "--workers", "1"])
    capsys.readouterr()
    return ["--set", f'data.corpus=CorpusFolder(path="data/corpora/{name}")']


def run(words):
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    assert not code


def refused(words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def scored(words, capsys):
    capsys.readouterr()
    run([*words, "--json"])
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def directions(value):
    return "data.mixture.tasks=[{task: " + json.dumps(f"Translation(directions={value})") + "}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("eval")
        patch.chdir(path)
        patch.setenv("MOESAIC_HOME", str(path / "data"))
        yield path


@pytest.fixture(scope="module")
def defr(folder):
    """A run from German to French, as its corpus stores it: without English."""

    class Quiet:
        def readouterr(self):
            return None

    corpus = build("defr", [("de", "fr", 300)], Quiet())
    run(
        [
            "train",
            "tiny",
            "--out",
            "defr",
            *TINY,
            *corpus,
            "--set",
            directions("StoredDirections()"),
        ]
    )
    return folder / "defr"


THREE = [("de", "en", 300), ("en", "fr", 300)]


def test_eval_scores_the_directions_that_were_trained(folder, capsys):
    corpus = build("three", THREE, capsys)
    out = folder / "runs" / "to-english"
    run(["train", "tiny", "--out", out, *TINY, *corpus, "--set", directions("ToEnglish()")])
    assert f"next: moesaic eval {out}" in capsys.readouterr().out.replace("\n", "")
    found = scored(["eval", out, "--limit", 3, "--resamples", 20], capsys)
    kept = [f"{row['source']}-{row['target']}" for row in found["languages"].values()]
    assert kept == ["deu_Latn-eng_Latn", "fra_Latn-eng_Latn"]
    summary = json.loads(RunDir(out).summary.read_text())
    assert summary["languages"].keys() == found["languages"].keys()


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("StoredDirections()", [("deu_Latn", "eng_Latn"), ("eng_Latn", "fra_Latn")]),
        ('ListedDirections(pairs=["fra_Latn-eng_Latn"])', [("fra_Latn", "eng_Latn")]),
        ("PivotDirections()", [("deu_Latn", "fra_Latn"), ("fra_Latn", "deu_Latn")]),
    ],
)
def test_the_directions_of_the_mixture_are_those_to_score(members, expected, folder, capsys):
    """Without training: what it records of a mixture, and what is then scored."""
    corpus = build("three", THREE, capsys)
    changes = [word for word in (*TINY, *corpus, directions(members)) if "=" in word]
    config = find_recipe("tiny", changes=changes)
    place = Preparation(RunDir(folder / members.partition("(")[0]), SingleProcess(), [].append)
    place.run_dir.path.mkdir()
    config.data.prepare(place).record(place.run_dir, seed=0)
    evaluated = EvaluatedRun(
        place.run_dir.path, config, read_trained_directions(place.run_dir.directions)
    )
    tests = evaluated.held_out_tests(evaluated.corpus()).tests
    assert [(test.source, test.target) for test in tests] == expected


def test_a_corpus_without_english_works_end_to_end(defr, capsys):
    found = scored(["eval", defr, "--limit", 3, "--resamples", 20], capsys)
    assert list(found["languages"]) == ["deu_Latn-fra_Latn"]
    assert found["languages"]["deu_Latn-fra_Latn"]["name"] == "German → French"
    curve = scored(["curve", defr, "--limit", 2], capsys)
    assert curve["languages"] == ["deu_Latn-fra_Latn"]
    run(["report", defr, "--checkpoints"])
    assert "German → French" in RunDir(defr).report.read_text(encoding="utf-8")


def test_from_and_to_choose_among_held_out_strings(defr, capsys):
    found = scored(["eval", defr, "--from", "de", "--to", "fr", "--limit", 2], capsys)
    assert list(found["languages"]) == ["deu_Latn-fra_Latn"]
    before = RunDir(defr).summary.read_text()
    back = scored(["eval", defr, "--from", "fr", "--to", "de", "--limit", 2], capsys)
    assert list(back["languages"]) == ["fra_Latn-deu_Latn"]
    assert any("not a direction that the run was trained on" in note for note in back["notes"])
    assert RunDir(defr).summary.read_text() == before  # never the headline of the run
    assert "deu_Latn-fra_Latn" in refused(["eval", defr, "--to", "de"], capsys)
    assert "deu_Latn-fra_Latn" in refused(["curve", defr, "--from", "fr"], capsys)


def test_a_language_model_is_scored_by_perplexity(folder, capsys):
    corpus = build("texts", [("de", "fr", 200)], capsys)
    run(["train", "tiny-lm", "--out", "lm", *TINY, *corpus])
    assert "next: moesaic eval lm" in capsys.readouterr().out
    found = scored(["eval", "lm", "--resamples", 20], capsys)
    assert [group["name"] for group in found["groups"]] == ["all documents", "German", "French"]
    assert "trained on no translation" in refused(["curve", "lm"], capsys)
    run(["report", "lm"])


def test_a_decoder_only_run_is_scored_in_its_direction(folder, capsys):
    corpus = build("decoder", [("de", "fr", 300)], capsys)
    change = ["--set", directions("BothDirections()")]
    run(["train", "tiny-lm", "--out", "decoder", *TINY, *corpus, *change])
    found = scored(["eval", "decoder", "--limit", 2, "--resamples", 20], capsys)
    assert list(found["languages"]) == ["deu_Latn-fra_Latn", "fra_Latn-deu_Latn"]


def test_one_small_language_does_not_stop_the_others(folder, capsys):
    corpus = build("small", [("en", "de", 300), ("en", "fr", 2)], capsys)
    run(["train", "tiny", "--out", "small", *TINY, *corpus])
    found = scored(["eval", "small", "--limit", 3, "--resamples", 20], capsys)
    assert list(found["languages"]) == ["deu_Latn"]
    assert any("no test rows" in n and "eng_Latn-fra_Latn" in n for n in found["notes"])
    assert "no test rows" in RunDir(Path("small")).report.read_text(encoding="utf-8")
    assert scored(["curve", "small", "--limit", 2], capsys)["languages"] == ["deu_Latn"]


def test_a_moved_run_is_scored_from_any_folder_and_nothing_is_built(
    defr, tmp_path, capsys, monkeypatch
):
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(defr, moved)
    pairs = tmp_path / "mine.tsv"
    pairs.write_text("Die Tür\tLa porte\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path / "home"))
    found = scored(["eval", moved, "--pairs", pairs, "--to", "fr", "--resamples", 20], capsys)
    assert list(found["languages"]) == ["deu_Latn-fra_Latn"]  # the trained source, not English
    assert found["systems"] == ["model", "copy"]
    assert any("corpus was not found" in note for note in found["notes"])
    message = refused(["eval", moved], capsys)
    assert "--corpus DIR" in message
    assert "defr" in message
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "data").exists()
    corpus = defr.parent / "data" / "corpora" / "defr"
    found = scored(["eval", moved, "--corpus", corpus, "--limit", 2], capsys)
    assert list(found["languages"]) == ["deu_Latn-fra_Latn"]
    user = tmp_path / "user" / "moesaic" / "corpora"  # searched beside the data home
    shutil.copytree(corpus, user / "defr")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    assert scored(["eval", moved, "--limit", 2], capsys)["languages"]
    # a run in its place is scored from here: its relative path is from the folders above it
    assert scored(["eval", defr, "--limit", 2], capsys)["languages"]


def test_another_corpus_than_the_trained_one_is_said(defr, folder, capsys):
    build("other", [("de", "fr", 90)], capsys)
    found = scored(["eval", defr, "--corpus", "data/corpora/other", "--limit", 2], capsys)
    assert any("not the corpus that" in note for note in found["notes"])


def test_a_test_file_is_normalised_as_training_text_and_odd_rows_are_said(defr, capsys):
    rows = list(zip(sentences("de", 20), sentences("fr", 20), strict=True))
    plain = "\n".join("\t".join(row) for row in rows)
    Path("nfc.tsv").write_text(plain + "\n", encoding="utf-8")
    odd = unicodedata.normalize("NFD", plain).replace(" ", "\u00a0")
    Path("nfd.tsv").write_text(odd + "\n", encoding="utf-8")
    words = ["--to", "fr", "--resamples", 20]
    clean, mended = (
        scored(["eval", defr, "--pairs", name, *words], capsys) for name in ("nfc.tsv", "nfd.tsv")
    )
    key = "deu_Latn-fra_Latn"
    assert mended["languages"][key]["model"]["chrf"] == clean["languages"][key]["model"]["chrf"]
    assert mended["languages"][key]["strings"] == clean["languages"][key]["strings"]
    assert set(mended["languages"][key]["model"]["raw_references"]) >= {"chrf", "bleu"}
    assert clean["languages"][key]["model"]["raw_references"] == {}
    assert any("as they are in the file" in note for note in mended["notes"])
    Path("header.tsv").write_text(f"German\tFrench\n{plain}\nLeer\t\n", encoding="utf-8")
    notes = " ".join(scored(["eval", defr, "--pairs", "header.tsv", *words], capsys)["notes"])
    assert "looks like a header" in notes
    assert "1 of 22 references are empty (row 22)" in notes


def test_rows_that_were_trained_on_are_counted_and_scored_apart(defr, capsys):
    rows = list(zip(sentences("de", 300), sentences("fr", 300), strict=True))
    text = "\n".join(f"{a}\t{b}" for a, b in rows) + "\n"
    Path("mixed.tsv").write_text(text + "Ganz neu hier\tTout neuf ici\n", encoding="utf-8")
    words = ["eval", defr, "--pairs", "mixed.tsv", "--to", "fr", "--resamples", 10]
    found = scored(words, capsys)
    group = found["languages"]["deu_Latn-fra_Latn"]["groups"]["seen"]
    trained = read_trained_directions(RunDir(defr).directions)
    assert group["count"] == trained.streams[0].rows
    assert group["rest"] == 301 - group["count"]
    assert set(group["outside"]["model"]) >= {"chrf", "bleu"}
    assert any(f"{group['count']} of 301 rows were trained on" in n for n in found["notes"])
    assert "seen" not in scored(["eval", defr, "--limit", 9], capsys)["languages"][
        "deu_Latn-fra_Latn"
    ]["groups"]  # fmt: skip


def test_answers_that_were_cut_are_counted(defr, capsys):
    found = scored(["eval", defr, "--limit", 5, "--resamples", 10], capsys)
    cut = found["counts"]["cut_answers"]
    notes = [note for note in found["notes"] if "cut at the length limit" in note]
    assert bool(cut) == bool(notes)
    assert 0 <= cut <= 5


def test_runs_are_compared_on_one_page(defr, folder, capsys):
    run(["eval", defr, "--limit", 3, "--resamples", 10])
    again = folder / "again"
    if not again.exists():
        shutil.copytree(defr, again)
    found = scored(["compare", defr, again, "--out", "two.html"], capsys)
    assert found["runs"] == ["defr", "again"]
    assert found["common_languages"] == ["deu_Latn-fra_Latn"]
    assert found["notes"] == []
    assert found["config_differences"] == {}
    page = Path("two.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert page.count('class="lines"') >= 3
    assert "needs at least two runs" in refused(["compare", defr], capsys)
    assert "given twice" in refused(["compare", defr, defr], capsys)
    assert "no such run" in refused(["compare", defr, folder / "nothing"], capsys)
