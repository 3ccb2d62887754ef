"""MXFP4 weights are read as the values that they stand for."""

import json

import pytest
import torch
from transformers_models import MODELS

from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.exchange.export_model import export_model
from moesaic.exchange.import_model import import_model
from moesaic.exchange.mxfp4 import dequantise_mxfp4


def test_each_value_is_four_bits_times_the_power_of_its_block():
    blocks = torch.zeros(2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0xF7  # 6 in the lower half, -6 in the upper one
    blocks[1, 0, 15] = 0x19
    values = dequantise_mxfp4(blocks, torch.tensor([[128], [126]], dtype=torch.uint8))
    assert values.dtype == torch.bfloat16
    assert values[0, :3].tolist() == [12.0, -12.0, 0.0]
    assert values[1, -2:].tolist() == [-0.25, 0.25]


def test_weights_in_mxfp4_are_read_as_transformers_dequantises_them(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="needs the extra [hf]")
    theirs = MODELS["gpt_oss"].build(intermediate_size=32)
    theirs.bfloat16().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    plain = read_tensors(path)
    tensors = dict(plain)
    for name in plain:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(118, 130, shape, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = mxfp4.convert_moe_packed_tensors(blocks, scales)
    write_tensors(path, tensors=tensors)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    found = import_model(tmp_path / "theirs", out=tmp_path / "ours")
    assert not any("nothing here reads" in note for note in found.notes)
    export_model(tmp_path / "ours", out=tmp_path / "back")
    back = read_tensors(tmp_path / "back/model.safetensors")
    assert back.keys() == plain.keys()
    assert all(back[name].equal(plain[name]) for name in plain)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
