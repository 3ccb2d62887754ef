"""Wrong uses of every command end with exit code 2, a sentence, and JSON where it was asked for."""

import json
import os
import shlex
from pathlib import Path

import pytest

from moesaic.cli.main import main

TINY_RUN = "train tiny --quiet --set steps=3 --set schedule.warmup=1 --set validation.every=3 --out"

# first those that a new user made (November 2026), then others of their kinds
WRONG_USES = """
trian
--hlep
demo --recipe dmeo --out x1
demo --out lines.txt --recipe tiny
demo --set steps=many --out x2 --json
train tinny --out x3
train tiny --out x3 --set stpes=3
train tiny --out x3 --set steps=-3
train tiny --out x3 --set steps=abc --json
train tiny --out x3 --set model.moe.select=Topk
train tiny --out x3 --set 'model.moe.select=TopK(kk=2)'
train tiny --out x3 --set 'model.moe.select=TopK(k=2'
train tiny --out x3 --set 'model.moe.select=TopK(k=99)'
train tiny --out x3 --set model.dim=63
train tiny --out x3 --set steps
train tiny --out x3 --use nothere.py
train tiny --out x3 --use pairs.tsv
train tiny --out lines.txt
train --resume nowhere
train --resume adir
train
train tiny --out x3 --until -5
train tiny --out x3 --set data.languages=[de,xx]
train tiny --out x3 --set precision=bf16
train tiny --out runs/first --set precision=BFloat16
train broken.yaml --out x3
train typo.yaml --out x3
train pairs.tsv --out x3
train tiny --out x3 --set 'data.corpus=CorpusFolder(path="nope")'
train tiny --out x3 --set 'data.corpus=NamedCorpus(name="nope")'
train tiny --out /proc/x
launch tiny
launch tiny --gpus-per-node 8 --launcher slrum
launch tiny --gpus-per-node 0
launch tiny --gpus-per-node 8 --launcher 'Slurm(tme=3)'
launch tiny --gpus-per-node 8 --launcher torchrun --out nodir/x.sh
export runs/first --to peft --out x3 --verify
import adir --out x3 --base runs/first --verify
translate runs/nope lines.txt --to qaa
translate runs/first nope.txt --to qaa
translate runs/first lines.txt --to klingon
translate runs/first lines.txt --to fr --json
translate runs/first lines.txt
translate runs/first lines.txt --to qaa --beam 0
translate runs/first lines.txt --to qaa --n-best 5 --beam 2
translate runs/first bin.dat --to qaa
translate runs/first latin.txt --to qaa
translate runs/first adir --to qaa
translate adir lines.txt --to qaa
eval runs/first --split tset
eval runs/first --pairs nope.tsv --to qaa
eval runs/first --pairs latin.tsv --to qaa
eval runs/first --pairs empty.tsv --to qaa
eval runs/first --pairs pairs.tsv
eval runs/first --testset flores
eval runs/first --limit 0
eval adir --json
curve runs/nope
curve runs/first --split foo
curve runs/first --to xx --json
ckpt inspect nope
ckpt diff runs/first
ckpt verify pairs.tsv --json
ckpt reshard runs/first --out z
routes show nope.routes
routes show pairs.tsv
routes stats pairs.tsv --tokenizer pairs.tsv --json
verify tiny --world-size 3 --plans onw
verify tinny --world-size 2
verify tiny --world-size 2 --plans config --set parallel.plan.expert=3 --json
explain dmeo
explain demo --set model.moe.experts=0
explain demo --set model.moe.expert=4 --json
scale tiny
scale tiny --world-size 8 --micro-batch 3x
scale tiny --world-size 7 --set parallel.plan.expert=2
scale tiny --world-size 8 --memory 80furlongs --json
data build nope
data build nope.yaml
data build broken.yaml
data build typo.yaml --json
data build pairs.tsv
data stats nope
data show synthetic --to fr
data show synthetic --to qaa --split tset
data show synthetic --to qaa -n -3
report nope
report adir --json
bench layer --shape Z
bench layer --shape 1,2,3
bench layer --against vllm --shape 8,8,8,4,2
bench layer --dtype int8 --shape 8,8,8,4,2 --json
config shwo
config show tinny
config diff tiny
config show old
doctor extra
doctor --jsn
config show tiny --set name=../../escaped
config show tiny --set name=/escaped
config show tiny --set name=[/red]
config show tiny --set name=
config show tiny --set =3
config show tiny --set model..dim=3
config show tiny --set model=3
config show tiny --set steps=1e400
config show tiny --set steps=.nan
config show tiny --set clip_norm=.inf
config show tiny --set seed=9223372036854775808
config show tiny --set 'name=*nothing'
config show tiny --set 'name=!!python/object:os.system'
config show tiny --set data.mixture.tasks.9.weight=2
config show tiny --set optimizer.lr=-1
config show tiny --set precision=[Float32]
config show tiny --use broken.py
config show tiny --use stops.py
config show tiny --use adir
config show tiny --use binary.py
config show adir
config show zcode-m3-64x
config upgrade nope.yaml
config upgrade lines.txt
config diff tiny tiny tiny
explain tiny --set model.dim=1099511627776
explain tiny --set model.encoder.layers=1000000000
explain tiny --set data.loader.batch_tokens=1000000000000 --json
explain tiny --set model.attention.heads=0
explain tiny --set model.feed_forward.hidden=-1
explain ''
scale tiny --world-size 0
scale tiny --world-size 99999999999999999999
scale tiny --world-size 8 --memory nan
scale tiny --world-size 8 --micro-batch 00x5+5
scale tiny --world-size 8 --world 8
launch tiny --gpus-per-node 8 --nodes -1
launch tiny --gpus-per-node 8 --max-restarts -1
launch tiny --gpus-per-node 99999999999999999999999999
launch tiny --gpus-per-node 8 --out adir
launch tiny --gpus-per-node 8 --out lines.txt/x.sh
launch tiny --gpus-per-node 8 --launcher 'Slurm('
verify tiny --world-size 1
verify tiny --world-size 100000
verify tiny --timeout-s nan
train tiny --until 0 --out x3
train tiny --until 1.5 --out x3
train tiny --out ''
train tiny --resume auto --set name=''
train tiny --out lines.txt/deeper
train adir --out x3
train --resume lines.txt
train tiny demo
translate runs/first lines.txt --to ''
translate runs/first lines.txt --to qaa --beam 1e3
translate runs/first lines.txt --to qaa --length-penalty nan
translate runs/first lines.txt --to qaa --routes adir
translate runs/first lines.txt --to qaa --routes lines.txt/x.routes
eval runs/first --pairs adir --to qaa
eval runs/first --moses pairs.tsv --to qaa
eval runs/first --resamples 0
eval runs/first --pairs pairs.tsv --moses pairs.tsv pairs.tsv --to qaa
eval runs/first --limit 1000000000000000000000000
eval lines.txt
curve runs/first --limit -1
curve adir
report lines.txt
ckpt inspect lines.txt/x
ckpt reshard runs/first --out lines.txt --full
ckpt reshard runs/first --shards 0 --out z
ckpt reshard runs/first --shards 2 --full --out z
ckpt
routes show adir
routes show pairs.tsv --row -1
routes compare pairs.tsv pairs.tsv
bench layer --shape -1,2,3,4,5
bench layer --shape 8,8,8,2,4
bench layer --shape 8,8,8,4,2 --rounds 0
bench layer --shape 99999999999,9999999,9999999,64,2 --against dense --rounds 1
bench layer --shape 8,8,8,4,2 --threads -1
data show synthetic --to qaa -n 0
data show synthetic --from fr
data show synthetic --to qaa --in qaa
data build adir
data stats lines.txt
data build ../../escaped
help trian
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("MOESAIC_HOME", str(path / "data"))
        _write_files()
        with pytest.raises(SystemExit) as end:
            main([*shlex.split(TINY_RUN), "runs/first"])
        assert not end.value.code
        yield path


def _write_files():
    Path("adir").mkdir()
    Path("lines.txt").write_text("Open the file\n")
    Path("pairs.tsv").write_text("Open\tTopoba\n")
    Path("empty.tsv").write_text("")
    Path("latin.tsv").write_bytes("é\tKa\n".encode("latin-1"))
    Path("latin.txt").write_bytes("x\n".encode("utf-16"))
    Path("bin.dat").write_bytes(bytes(range(255, 0, -1)))
    Path("broken.yaml").write_text("name: [x\n")
    Path("typo.yaml").write_text("nme: x\nsource: {kind: Fles}\n")
    Path("broken.py").write_text("import math\nraise ValueError('[/red] \\\\[/]')\n")
    Path("stops.py").write_text("raise SystemExit(0)\n")
    Path("binary.py").write_bytes(b"\x00\xff\xfe")
    Path("old").mkdir()
    Path("old/config.yaml").write_text("name: x\nmodel: {moe: {select: {kind: Hashed}}}\n")


def _wrong_uses():
    return [shlex.split(line) for line in WRONG_USES.strip().splitlines()]


def test_there_are_as_many_as_were_made():
    assert len(_wrong_uses()) >= 150


@pytest.mark.parametrize("words", _wrong_uses(), ids=" ".join)
def test_a_wrong_use_ends_with_a_sentence(words, folder, capsys, tmp_path):
    words = [str(tmp_path / "new") if word == "x3" else word for word in words]
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    assert end.value.code == 2, captured
    assert "error: " in captured.err
    assert "Traceback" not in captured.err
    sentence = captured.err.partition("error: ")[2].strip()
    assert len(sentence) > 15
    if "--json" in words:
        assert json.loads(captured.out.splitlines()[-1])["error"]
    assert not Path(os.pardir, os.pardir, "escaped").exists()
