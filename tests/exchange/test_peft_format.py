"""Adapters in PEFT's format compute the same in transformers and PEFT, and come back the same."""

import json

import pytest
import torch
from transformers_models import LAYOUTS, MODELS

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import write_run_record
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.core.errors import CheckpointError
from moesaic.data.batch import Batch, InputRows
from moesaic.exchange.import_model import import_model
from moesaic.exchange.peft_format import export_adapter, import_adapter
from moesaic.model.transformer import Transformer
from moesaic.nn.adapter import is_of_adapter
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.train.merge_adapter import merge_adapter
from moesaic.train.run import Run
from moesaic.train.warm_start import WeightsOfRun

pytest.importorskip("transformers", reason="needs the extra [hf]")
peft = pytest.importorskip("peft", reason="compares with PEFT")
LORA = LoRA(rank=2, alpha=6.0, targets=("experts", "attention"))
ROWS = torch.arange(24).view(2, 12) * 3 % 96
NAMES = ("qwen3_moe", "mixtral", "qwen2_moe")


def logits(run: RunDir, rows=ROWS):
    model = load_transformer(Run.from_yaml(run.config.read_text()).model, run.model).eval()
    keys = torch.zeros(len(rows), dtype=torch.long)
    labels = torch.ones_like(rows)
    batch = Batch(InputRows.empty(len(rows)), InputRows.full(rows), labels, {}, keys)
    return model.predict(model(batch).hidden).view(*rows.shape, -1)


def started(name, tmp_path):
    """Return a model of transformers and the directory of the imported one."""
    theirs = MODELS[name].build()
    LAYOUTS["fused"](theirs, tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=tmp_path / "base")
    return theirs, RunDir(tmp_path / "base")


def tuned(base: RunDir, path, choice=LORA) -> RunDir:
    """Return a run with a random adapter, as training writes it."""
    run, plan = RunDir(path), Run.from_yaml(base.config.read_text())
    model = Transformer(plan.model)
    choice.attach(model)
    named = model.named_parameters()
    made = {n: 0.1 * torch.randn_like(p) for n, p in named if is_of_adapter(n)}
    start = WeightsOfRun(path=str(base.path)).pinned()
    plan = plan.replace(initial_weights=start, trainable=choice)
    path.mkdir()
    run.config.write_text(plan.to_yaml())
    write_tensors(run.adapter, tensors=made)
    write_run_record(run, config=plan.to_dict(), plugins=())
    return run


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_adapter_computes_in_peft_what_the_merged_model_does(name, tmp_path):
    theirs, base = started(name, tmp_path)
    run = tuned(base, tmp_path / "tuned")
    merge_adapter(run)
    assert export_adapter(run.path, out=tmp_path / "peft") > 0
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    wanted = logits(run)
    assert (logits(base) - wanted).abs().max() > 1e-3
    assert (model(input_ids=ROWS).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    import_adapter(tmp_path / "peft", base=base.path, out=tmp_path / "again")
    one, two = (read_tensors(RunDir(tmp_path / p).adapter) for p in ("tuned", "again"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "o_proj"], ["k_proj"]])
def test_an_adapter_of_peft_is_merged_into_what_peft_computes(targets, tmp_path):
    theirs, base = started("qwen3_moe", tmp_path)
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if len(targets) > 1 else []
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=targets,
        target_parameters=fused,
        init_lora_weights=False,
        use_rslora=not fused,
    )
    model = peft.get_peft_model(theirs, config).eval()
    model.save_pretrained(tmp_path / "peft")
    import_adapter(tmp_path / "peft", base=base.path, out=tmp_path / "tuned")
    merge_adapter(RunDir(tmp_path / "tuned"))
    wanted = model(input_ids=ROWS).logits
    got = logits(RunDir(tmp_path / "tuned"))
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_is_no_plain_lora_or_of_another_model_is_refused(tmp_path):
    theirs, base = started("qwen3_moe", tmp_path)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora=True, expected False"):
        import_adapter(tmp_path / "peft", base=base.path, out=tmp_path / "tuned")
    path.write_text(json.dumps(found))
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    write_tensors(weights, tensors=read_tensors(weights) | {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="x is of no matrix of"):
        import_adapter(tmp_path / "peft", base=base.path, out=tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="trainable is AllParameters"):
        export_adapter(base.path, out=tmp_path / "other")
    assert not (tmp_path / "tuned").exists()
    assert not (tmp_path / "other").exists()
