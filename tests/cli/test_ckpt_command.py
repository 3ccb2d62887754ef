"""``moesaic ckpt``: output and exit codes."""

import json
import os

import pytest
import torch
from checkpoint_samples import snapshot, written
from test_full_checkpoint_save import same

from moesaic.checkpoint.full_checkpoint import load_checkpoint, save_checkpoint
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import write_run_record
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.cli.main import main


def run_json(words, capsys, *, code=0):
    """Run a verb that ends with ``code``; return the object it prints last."""
    try:
        main([*words, "--json"])
        ended = 0
    except SystemExit as end:
        ended = end.code or 0
    assert ended == code
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def shown(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    return " ".join(capsys.readouterr().out.split())


def test_inspect_shows_the_contents_of_a_checkpoint(tmp_path, capsys):
    path = written(tmp_path, "three shards")
    found = run_json(["ckpt", "inspect", str(path), "--tensors"], capsys)
    assert (found["form"], found["step"], found["plan"]) == ("shards", 5, {"data": 2})
    assert found["kinds"]["model"] == {"tensors": 5, "values": 55, "bytes": 4 * 52 + 2 * 3}
    assert (
        found["expert_parameters"]["model/up"]
        == found["expert_parameters"]["optimizer/m/up_bias"]
        == 4
    )
    blocks = {f["file"]: f["blocks"] for f in found["files"]}
    assert sum(blocks.values()) == 2 * (4 + 4 + 1 + 1) + 5
    assert min(blocks[f"shard-0000{n}.safetensors"] for n in range(3)) > 0
    (up,) = (t for t in found["tensors"] if t["name"] == "model/up")
    assert up == {"name": "model/up", "dtype": "F32", "shape": [4, 3, 2], "experts": 4, "blocks": 4}
    text = shown(["ckpt", "inspect", str(path)], capsys)
    assert "step 5, shards" in text
    assert "expert parameters: 4 with 4 experts" in text


def test_a_directory_or_run_stands_for_its_newest_checkpoint(tmp_path, capsys):
    root = tmp_path / "run" / "checkpoints"
    for step in (3, 8, 5):
        save_checkpoint(root, snapshot(step=step))
    for path in (root, root.parent):
        assert run_json(["ckpt", "inspect", str(path)], capsys)["step"] == 5
    error = run_json(["ckpt", "inspect", str(tmp_path)], capsys, code=2)["error"]
    assert "no checkpoint found; expected a directory step-N" in error


def test_verify_ends_with_2_if_anything_is_wrong(tmp_path, capsys):
    path = written(tmp_path, "three shards")
    assert run_json(["ckpt", "verify", str(path)], capsys)["sound"] is True
    assert "sound" in shown(["ckpt", "verify", str(path)], capsys)
    (path / "shard-00002.safetensors").unlink()
    found = run_json(["ckpt", "verify", str(path)], capsys, code=2)
    assert found["sound"] is False
    assert found["findings"][0]["location"] == "shard-00002.safetensors"
    assert "shard-00002.safetensors: is missing" in shown(["ckpt", "verify", str(path)], capsys)


def test_verify_lenient_accepts_zero_experts(tmp_path, capsys):
    up = snapshot().files["model"]["up"].clone()
    up[1] = 0.0
    path = str(written(tmp_path, "whole", snapshot(up=up)))
    assert run_json(["ckpt", "verify", path], capsys, code=2)["sound"] is False
    found = run_json(["ckpt", "verify", path, "--lenient"], capsys)
    assert found["sound"] is True
    assert found["findings"][0]["location"] == "model/up/expert-0001"


def test_diff_names_what_differs(tmp_path, capsys):
    left = written(tmp_path / "l", "whole")
    right = written(tmp_path / "r", "three shards", snapshot(dense=torch.zeros(5, 4)))
    found = run_json(["ckpt", "diff", str(left), str(right)], capsys)
    assert (found["tensors"], found["same"]) == (15, 14)
    assert found["differences"][0]["name"] == "model/dense"
    assert found["differences"][0]["relative"] == pytest.approx(1.0)
    text = shown(["ckpt", "diff", str(left), str(right)], capsys)
    assert "14 of 15 tensors are the same" in text


def test_reshard_writes_the_requested_form(tmp_path, capsys):
    path = str(written(tmp_path, "three shards"))
    whole = run_json(["ckpt", "reshard", path, "--full", "--out", str(tmp_path / "w")], capsys)
    assert whole["files"] == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    cut = run_json(["ckpt", "reshard", path, "--shards", "2", "--out", str(tmp_path / "c")], capsys)
    assert "shard-00001.safetensors" in cut["files"]
    for made in ("w", "c"):
        assert same(load_checkpoint(tmp_path / made), snapshot())
    error = run_json(["ckpt", "reshard", path, "--out", str(tmp_path / "x")], capsys, code=2)[
        "error"
    ]
    assert "expected one of --shards N and --full" in error


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["gone", "directory", "pipe", "dangling link"])
def test_verify_misses_a_recorded_file_of_a_run(tmp_path, capsys, name, kind):
    """A run without its weights was reported as sound."""
    run = RunDir(tmp_path / "run")
    save_checkpoint(run.checkpoints, snapshot(step=3))
    run.config.write_text("{}", encoding="utf-8")
    run.tokenizer.write_text("{}", encoding="utf-8")
    write_tensors(run.model, tensors={"up": torch.ones(2)})
    write_run_record(run, config={}, plugins=())
    assert run_json(["ckpt", "verify", str(run.path)], capsys)["sound"] is True
    path = run.path / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")

    found = run_json(["ckpt", "verify", str(run.path)], capsys, code=2)

    assert f"{name} is missing" in json.dumps(found)


@pytest.mark.parametrize("name", ["{x}", "[bold]run[/]", "[/red]", "a\x1b[31mb"])
def test_verify_and_adopt_show_the_name_of_a_run_as_it_is(tmp_path, capsys, name):
    """``adopt`` took braces of a path for a template and brackets for markup."""
    run = RunDir(tmp_path / name)
    run.path.mkdir(parents=True)
    for path in (run.config, run.tokenizer):
        path.write_text("{}", encoding="utf-8")
    write_tensors(run.model, tensors={"up": torch.ones(2)})
    write_run_record(run, config={}, plugins=())
    path = str(run.path).replace("\x1b", "\\x1b")
    for command in ("verify", "adopt"):
        assert f"{path}: " in shown(["ckpt", command, str(run.path)], capsys)
