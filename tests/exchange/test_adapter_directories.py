"""The directories of adapters: what lies beside the weights of the model that they change."""

import pytest
import torch
from hf_directories import DIM, mixtral_shapes, random_tensors, write_directory

from moesaic.checkpoint.plugins import Plugin
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import read_run_record, write_run_record
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.core.errors import CheckpointError
from moesaic.core.files import sha256, write_json
from moesaic.core.yaml_reader import read_yaml_file
from moesaic.exchange.import_model import import_model
from moesaic.exchange.peft_format import export_adapter, import_adapter
from moesaic.serve.load_model import load
from moesaic.train.merge_adapter import merge_adapter

BESIDE = ("text_rules.json", "vocabulary.json", "directions.json", "plugins/gate.py")


@pytest.fixture
def base(tmp_path):
    """An imported model with all that a run may have beside its weights."""
    theirs = write_directory(tmp_path / "theirs", random_tensors(mixtral_shapes("fused")))
    import_model(theirs, out=tmp_path / "base")
    run = RunDir(tmp_path / "base")
    run.plugins.mkdir()
    for name in BESIDE[1:]:
        (run.path / name).write_text("{}")
    plugin = Plugin(name="gate.py", sha256=sha256(run.plugins / "gate.py"), choices=(), stored=True)
    write_run_record(run, config=read_yaml_file(run.config), plugins=(plugin,))
    return run


@pytest.fixture
def peft_adapter(tmp_path):
    """An adapter of two projections, as PEFT writes it."""
    path = tmp_path / "peft"
    path.mkdir()
    write_json(path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    first, second = torch.randn(2, DIM), torch.randn(DIM, 2)
    tensors = {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second}
    write_tensors(path / "adapter_model.safetensors", tensors=tensors)
    return path


def test_an_imported_adapter_has_all_that_its_model_has_beside_its_weights(
    base, peft_adapter, tmp_path
):
    assert import_adapter(peft_adapter, base=base.path, out=tmp_path / "tuned") == 1
    tuned = RunDir(tmp_path / "tuned")
    for name in (*BESIDE, "imported/config.json"):
        assert (tuned.path / name).read_bytes() == (base.path / name).read_bytes()
    before, after = (read_run_record(run) for run in (base, tuned))
    assert after.plugins == before.plugins != ()
    assert after.files.keys() - before.files.keys() == {"adapter.safetensors"}


def test_a_saved_model_has_no_adapter_that_its_weights_may_differ_from(
    base, peft_adapter, tmp_path
):
    import_adapter(peft_adapter, base=base.path, out=tmp_path / "tuned")
    merge_adapter(RunDir(tmp_path / "tuned"))
    load(tmp_path / "tuned").save(tmp_path / "saved")
    saved = read_run_record(RunDir(tmp_path / "saved"))
    assert saved.plugins == read_run_record(base).plugins
    assert saved.files.keys() == read_run_record(base).files.keys()
    assert not RunDir(tmp_path / "saved").adapter.exists()


def test_an_adapter_of_an_earlier_version_comes_back_the_same(base, peft_adapter, tmp_path):
    import_adapter(peft_adapter, base=base.path, out=tmp_path / "tuned")
    for run in (base, RunDir(tmp_path / "tuned")):
        text = run.config.read_text()
        run.config.write_text(text.replace("  block_layout:", "  block:"))
        assert run.config.read_text() != text
    import_adapter(peft_adapter, base=base.path, out=tmp_path / "again")
    for name in ("tuned", "again"):
        assert export_adapter(tmp_path / name, out=tmp_path / f"{name}-peft") == 6  # k, v: zeros
        found = read_tensors(tmp_path / f"{name}-peft/adapter_model.safetensors")
        wanted = read_tensors(peft_adapter / "adapter_model.safetensors")
        assert all(found[key].equal(wanted[key]) for key in wanted)


def test_no_adapter_is_taken_from_or_put_beside_a_run_whose_files_were_changed(
    base, peft_adapter, tmp_path
):
    import_adapter(peft_adapter, base=base.path, out=tmp_path / "tuned")
    for run, weights in ((base, base.model), (RunDir(tmp_path / "tuned"), "adapter.safetensors")):
        with (run.path / weights).open("ab") as file:
            file.write(b"x")
    with pytest.raises(CheckpointError, match=r"model.safetensors .*Restore the files"):
        import_adapter(peft_adapter, base=base.path, out=tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"adapter.safetensors .*Restore the files"):
        export_adapter(tmp_path / "tuned", out=tmp_path / "out")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "out").exists()
