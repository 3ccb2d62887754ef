"""GGUF files in llama.cpp: the log-probabilities of the models they were made of."""

import pytest
import torch
from transformers_models import LAYOUTS, MODELS, YARN, TheirModel

from moesaic.core.errors import CheckpointError
from moesaic.exchange.compare_with_llama_cpp import compare_with_llama_cpp
from moesaic.exchange.export_gguf import export_gguf
from moesaic.exchange.families import FAMILIES
from moesaic.exchange.import_model import import_model
from moesaic.model.config import Stack
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.positional_encoding import Rotary
from serve.language_model_run import write_language_model_run

pytest.importorskip("transformers", reason="needs the extra [hf]")
pytest.importorskip("gguf", reason="needs the extra [gguf]")
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
IN_LLAMA_CPP = {
    name: MODELS[name] for name in ("mixtral", "qwen3_moe", "qwen2_moe", "llama", "qwen2")
} | {
    "olmoe": TheirModel(
        "Olmoe", MODELS["olmoe"].changes | {"clip_qkv": None, "num_key_value_heads": 4}
    ),
    "mistral": TheirModel("Mistral", {"tie_word_embeddings": True, "sliding_window": None}),
    "qwen3": TheirModel("Qwen3", {"head_dim": 12}),
    "yarn": TheirModel("Qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "linear": TheirModel("Llama", {"rope_parameters": LINEAR}),
}


def imported(model, path):
    LAYOUTS["fused"](model.build(), path / "theirs")
    import_model(path / "theirs", out=path / "ours")
    return path / "ours"


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_computes_the_log_probabilities_of_ours(name, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra [gguf]")
    ours = imported(IN_LLAMA_CPP[name], tmp_path)
    dtype = torch.float32 if name != "llama" else None
    assert export_gguf(ours, out=tmp_path / "file", dtype=dtype).tensors > 10
    found = compare_with_llama_cpp(tmp_path / "file", ours=ours)
    assert found.positions >= 200
    assert found.same_best == found.positions
    assert found.difference <= 2e-3


@pytest.mark.parametrize(
    ("name", "half"),
    [("mixtral", torch.float16), ("qwen2_moe", torch.float16), ("mixtral", torch.bfloat16)],
)
def test_half_as_many_bytes_give_nearly_the_same(name, half, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra [gguf]")
    ours = imported(IN_LLAMA_CPP[name], tmp_path)
    found = export_gguf(ours, out=tmp_path / "file", dtype=half)
    assert found.bytes < 0.6 * export_gguf(ours, out=tmp_path / "whole").bytes
    agreement = compare_with_llama_cpp(tmp_path / "file", ours=ours, dtype=half)
    assert agreement.difference > 1e-4  # it rounds activations too; ``BOUNDS`` holds


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (MODELS["mixtral with a window"], "model.attention.window is"),
        (MODELS["olmoe"], "attention.clip is 0.7"),
        (TheirModel("Qwen3Moe", MODELS["qwen3_moe"].changes | {"norm_topk_prob": False}), "normal"),
        (
            TheirModel("Qwen3Moe", MODELS["qwen3_moe"].changes | {"mlp_only_layers": [0]}),
            "dense layers .\[0\]. beside",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_named_and_nothing_is_written(
    model, sentence, tmp_path
):
    ours = imported(model, tmp_path)
    with pytest.raises(CheckpointError, match=f"llama.cpp computes .* otherwise: .*{sentence}"):
        export_gguf(ours, out=tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_tokenizer_made_here_gives_llama_cpp_the_same_ids(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra [gguf]")
    config = FAMILIES["mixtral"].mapping.template.replace(
        vocab_size=400,
        dim=32,
        decoder=Stack(layers=2, moe_every=1),
        attention=AttentionConfig(heads=4, kv_heads=2),
        moe=MoE(experts=4, hidden=48, select=TopK(k=2)),
        position=Rotary(pairing="neighbouring"),
    )
    ours = write_language_model_run(tmp_path / "ours", config=config).path
    assert export_gguf(ours, out=tmp_path / "file").layout == "llama"
    found = compare_with_llama_cpp(tmp_path / "file", ours=ours)
    assert found.texts == found.same_text == 10
    assert found.same_best == found.positions
    assert found.difference <= 1e-4
