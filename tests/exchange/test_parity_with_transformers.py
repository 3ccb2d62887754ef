"""Imported models against transformers, with small random models of every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_models import LAYOUTS, MODELS, ONE_LAYOUT, assert_exported_alike, layout_of

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import write_run_record
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.data.batch import Batch, InputRows
from moesaic.exchange.export_model import export_model
from moesaic.exchange.families import FAMILIES
from moesaic.exchange.import_model import import_model, imported_run
from moesaic.model.config import Stack
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import NoQKNorm, PerHeadQKNorm
from moesaic.serve.open_run import read_model_config

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
each_model = pytest.mark.parametrize("name", MODELS)
CELLS = [(n, layout) for n in MODELS for layout in LAYOUTS]
each_layout = pytest.mark.parametrize(
    ("name", "layout"),
    [cell for cell in CELLS if cell[0].split(",")[0] not in ONE_LAYOUT or cell[1] != "fused"],
)
PROMPT = 3


def imported(path: Path) -> Transformer:
    run = RunDir(path)
    return load_transformer(read_model_config(run), run.model).eval()


def batch_of(rows: Tensor) -> Batch:
    labels = torch.full_like(rows, 1)
    keys = torch.zeros(len(rows), dtype=torch.long)
    return Batch(InputRows.empty(len(rows)), InputRows.full(rows), labels, {}, keys)


def token_by_token(model: Transformer, rows: Tensor) -> Tensor:
    cache = model.init_cache(None, rows=len(rows))
    logits = [model.step(InputRows.full(rows[:, :PROMPT]), cache)]
    logits += [
        model.step(InputRows.full(rows[:, i : i + 1]), cache) for i in range(PROMPT, rows.shape[1])
    ]
    return torch.stack(logits, 1)


def record_chosen_experts(model: Any) -> list[Tensor]:
    """Return a list to which every router of a model of transformers adds what it selects."""
    found: list[Tensor] = []

    def add(_module: Any, _inputs: Any, output: Any) -> None:
        found.append(output[-1].sort(-1).values)

    def add_weighted(_module: Any, _inputs: Any, output: Any) -> None:
        found.append(output[0].nonzero()[:, 1].view(len(output[0]), -1))

    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(add)
        if type(module).__name__ == "Llama4Router":
            module.register_forward_hook(add_weighted)
    return found


@each_layout
def test_an_imported_model_computes_and_routes_as_in_transformers(name, layout, tmp_path):
    theirs = MODELS[name].build()
    LAYOUTS[layout](theirs, tmp_path / "theirs")
    found = import_model(tmp_path / "theirs", out=tmp_path / "ours")
    assert found.layout == layout_of(theirs, layout)
    assert not any("nothing here reads" in note for note in found.notes)
    ours, rows = imported(tmp_path / "ours"), torch.randint(0, 96, (2, 12))
    chosen = record_chosen_experts(theirs)
    wanted = theirs(input_ids=rows)
    output = ours(batch_of(rows))
    got = ours.predict(output.hidden).view_as(wanted.logits)
    assert (got - wanted.logits).abs().max() <= 1e-5
    assert (token_by_token(ours, rows) - wanted.logits[:, PROMPT - 1 :]).abs().max() <= 1e-5
    routed = [record.routing.expert.view(24, -1).sort(-1).values for record in output.records]
    for mine, yours in zip(routed, chosen, strict=True):
        assert mine.equal(yours)


@each_model
def test_gradients_of_an_imported_model_are_those_in_transformers(name, tmp_path):
    theirs = MODELS[name].build()
    LAYOUTS["fused"](theirs, tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=tmp_path / "ours")
    ours, rows = imported(tmp_path / "ours"), torch.randint(0, 96, (2, 12))
    direction = torch.randn(2 * 12, 96)
    (theirs(input_ids=rows).logits.view(24, 96) * direction).sum().backward()
    (ours.predict(ours(batch_of(rows)).hidden) * direction).sum().backward()
    with torch.no_grad():  # a model whose weights are the gradients, imported like one
        for parameter in theirs.parameters():
            if parameter.requires_grad:  # ERNIE has its correction of scores as one that is not
                parameter.copy_(parameter.grad)
    LAYOUTS["fused"](theirs, tmp_path / "gradients")
    import_model(tmp_path / "gradients", out=tmp_path / "wanted")
    wanted = read_tensors(tmp_path / "wanted/model.safetensors")
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[key]).abs().max() <= 1e-5 * wanted[key].abs().max(), key


@each_layout
def test_an_exported_model_is_loaded_without_a_missing_or_unexpected_key(name, layout, tmp_path):
    theirs = MODELS[name].build()
    LAYOUTS["per-expert"](theirs, tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=tmp_path / "ours")
    layout = layout_of(theirs, layout)
    export_model(tmp_path / "ours", out=tmp_path / "exported", layout=layout, shard_bytes=20_000)
    assert_exported_alike(theirs, transformers.AutoModelForCausalLM, tmp_path)


@pytest.mark.parametrize(
    ("family", "fraction"), [("qwen3_moe", 1.0), ("glm4_moe", 0.5), ("ernie4_5_moe", 1.0)]
)
def test_a_model_that_rotates_other_pairs_is_exported_with_those_of_theirs(
    family, fraction, tmp_path
):
    template = FAMILIES[family].mapping.template
    pairing = {"halves": "neighbouring", "neighbouring": "halves"}[template.position.pairing]
    norm = NoQKNorm() if family == "ernie4_5_moe" else PerHeadQKNorm()
    select = SwitchTop1() if family == "qwen3_moe" else template.moe.select.replace(k=2)
    config = template.replace(
        vocab_size=96,
        dim=32,
        decoder=Stack(layers=2, moe_every=1),
        attention=AttentionConfig(heads=4, kv_heads=2, qk_norm=norm),
        moe=template.moe.replace(experts=4, hidden=12, select=select),
        position=Rotary(pairing=pairing, fraction=fraction),
    )
    ours, run = Transformer(config).eval(), RunDir(tmp_path / "ours")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    plan = imported_run(run.path, config, theirs={}, languages=())
    write_tensors(run.model, tensors=export_weights(ours))
    run.config.write_text(plan.to_yaml())
    write_run_record(run, config=plan.to_dict(), plugins=())
    assert export_model(run.path, out=tmp_path / "theirs").family == family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    rows = torch.randint(0, 96, (2, 12))
    wanted = ours.predict(ours(batch_of(rows)).hidden).view(2, 12, 96)
    assert (theirs(rows).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
