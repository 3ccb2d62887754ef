import json
import pickle
import weakref

import numpy
import pytest
import torch
from hf_directories import (
    DIM,
    EXPERTS,
    HIDDEN,
    MIXTRAL_CONFIG,
    mixtral_shapes,
    random_tensors,
    write_directory,
)

from moesaic.checkpoint.checkpoint_directory import Disk
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.corpus.text_rules import read_text_rules
from moesaic.exchange import tensor_files
from moesaic.exchange.export_model import export_model
from moesaic.exchange.families import FAMILIES
from moesaic.exchange.import_model import import_model
from moesaic.exchange.tensor_files import TensorFiles
from moesaic.nn.attention_parts import SlidingWindow
from moesaic.nn.rotary_scaling import YaRN
from moesaic.recipes.lookup import find_recipe
from moesaic.serve.imported_generation import read_imported_generation
from moesaic.serve.load_model import load
from moesaic.serve.open_run import read_model_config
from moesaic.train.run_checks import check_run

LAYOUTS = ("per-expert", "fused")


@pytest.fixture
def mixtral(tmp_path):
    return write_directory(tmp_path / "theirs", random_tensors(mixtral_shapes("per-expert")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_value_of_theirs_is_where_ours_has_it(layout, tmp_path):
    theirs = random_tensors(mixtral_shapes(layout))
    found = import_model(write_directory(tmp_path / "theirs", theirs), out=tmp_path / "ours")
    assert (found.family, found.layout, found.tensors) == ("mixtral", layout, len(theirs))
    ours = read_tensors(tmp_path / "ours/model.safetensors")
    attention = "model.layers.1.self_attn."
    parts = [theirs[f"{attention}{name}_proj.weight"] for name in "qkv"]
    assert ours["decoder.1.self_attention.inner.qkv.weight"].equal(torch.cat(parts))
    up = ours["decoder.0.feed_forward.inner.experts.up"]
    if layout == "fused":
        assert up.equal(theirs["model.layers.0.mlp.experts.gate_up_proj"].transpose(1, 2))
    else:
        inside = "model.layers.0.block_sparse_moe.experts"
        for expert in range(EXPERTS):
            gate, value = (theirs[f"{inside}.{expert}.{n}.weight"] for n in ("w1", "w3"))
            assert up[expert, :, :HIDDEN].equal(gate.t())
            assert up[expert, :, HIDDEN:].equal(value.t())
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_export_after_import_gives_each_layout_bit_for_bit(layout, other, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 100)  # tables are copied row by row
    theirs = random_tensors(mixtral_shapes(layout))
    import_model(write_directory(tmp_path / "theirs", theirs), out=tmp_path / "ours")
    export_model(tmp_path / "ours", out=tmp_path / "other", layout=other, shard_bytes=3000)
    import_model(tmp_path / "other", out=tmp_path / "again")
    one, two = (read_tensors(tmp_path / p / "model.safetensors") for p in ("ours", "again"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    export_model(tmp_path / "again", out=tmp_path / "back", layout=layout)
    back = read_tensors(tmp_path / "back/model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(back[name].equal(theirs[name]) for name in theirs)


def test_an_imported_model_is_a_model_directory_like_any_other(mixtral, tmp_path):
    import_model(mixtral, out=tmp_path / "ours")
    run = find_recipe(str(tmp_path / "ours"))
    check_run(run)
    assert run.model == read_model_config(RunDir(tmp_path / "ours"))
    load(tmp_path / "ours")


def test_an_imported_model_reads_markup_and_lines_as_they_are_written(mixtral, tmp_path):
    import_model(mixtral, out=tmp_path / "ours")
    rules = read_text_rules(RunDir(tmp_path / "ours").text_rules)
    text = "Is <b>x</b> &amp; y?\n  def f():"
    assert rules.normalise(text) == rules.normalise_beginning(text) == text


def test_every_tensor_is_accounted_for_or_nothing_is_written(mixtral, tmp_path):
    shapes = mixtral_shapes("per-expert")
    first = next(iter(shapes))
    wrong = random_tensors({"extra.bias": (3,), **shapes, "model.norm.weight": (5,)})
    del wrong[first]
    directory = write_directory(tmp_path / "wrong", wrong)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    write_tensors(directory / "more.safetensors", tensors={"extra.bias": torch.zeros(3)})
    index["weight_map"]["again"] = "more.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        import_model(directory, out=tmp_path / "ours")
    for line in (
        "4 tensors are not those of its config (mixtral); nothing was written",
        f"| {first} | is missing |  | [40, 16] |",
        "| extra.bias | is unexpected | [3] |  |",
        "| extra.bias | is there twice |  |  |",
        "| model.norm.weight | has another shape | [5] | [16] |",
    ):
        assert line in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "wrong"]


def test_tensors_without_an_equivalent_are_left_out_on_request(tmp_path):
    theirs = random_tensors(mixtral_shapes("fused") | {"model.layers.2.enorm.weight": (DIM,)})
    directory = write_directory(tmp_path / "theirs", theirs)
    with pytest.raises(CheckpointError, match=r"--drop PATTERN(.|\n)*model.layers.2.enorm.weight"):
        import_model(directory, out=tmp_path / "ours")
    found = import_model(directory, out=tmp_path / "ours", drop=["model.layers.[12].*"])
    assert found.notes[0] == "left out on request: the tensors model.layers.[12].*"
    assert "decoder.1.feed_forward.norm.weight" in read_tensors(tmp_path / "ours/model.safetensors")


def test_a_tied_table_may_be_stored_twice_if_both_are_the_same(tmp_path):
    tied = MIXTRAL_CONFIG | {"tie_word_embeddings": True}
    theirs = random_tensors(mixtral_shapes("fused"))
    other = write_directory(tmp_path / "other", theirs, config=tied)
    with pytest.raises(CheckpointError, match=r"lm_head.weight \| differs from model.embed"):
        import_model(other, out=tmp_path / "ours")
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
    found = import_model(
        write_directory(tmp_path / "same", theirs, config=tied), out=tmp_path / "ours"
    )
    assert found.model.embedding.tied


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MIXTRAL_CONFIG))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"pickle.*save_file\(torch.load"):
        import_model(directory, out=tmp_path / "ours")


@pytest.mark.parametrize(
    ("file", "program"),
    [
        ("mp_rank_00_model_states.pt", "DeepSpeed or Megatron-LM"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "DeepSpeed-MoE"),
        ("checkpoint_last.pt", "fairseq"),
    ],
)
def test_a_checkpoint_of_another_program_is_named_and_not_opened(file, program, tmp_path):
    (tmp_path / file).write_bytes(b"not to be read")
    with pytest.raises(CheckpointError, match=f"{program}.*convert it where you trust it"):
        import_model(tmp_path, out=tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act: found "gelu", of which we have "silu" alone'),
        ({"rope_scaling": {"type": "spiral"}}, 'rope_type: found "spiral", expected one of'),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters: found no factor of linear"),
        ({"vocab_size": None}, "found no vocab_size"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
        ({"model_type": "mixtrall"}, "found model_type 'mixtrall'.*did you mean"),
    ],
)
def test_a_config_that_we_cannot_compute_is_refused(changes, sentence, tmp_path):
    directory = write_directory(tmp_path / "theirs", {}, config=MIXTRAL_CONFIG | changes)
    with pytest.raises((ConfigError, CheckpointError), match=sentence):
        import_model(directory, out=tmp_path / "ours")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("num_hidden_layers", 10**9, "found 1,000,000,000, but the files hold 35 tensors"),
        ("num_local_experts", 10**9, "found .* but the files hold routers of 3 experts at most"),
        (
            "vocab_size",
            10**12,
            "found .* but the files hold tensors of 40 rows and columns at most",
        ),
        ("hidden_size", 10**9, "found .* but the files hold tensors of 40 rows"),
        ("intermediate_size", 10**9, "found .* but the files hold tensors of 40 rows"),
        ("head_dim", 10**9, "found .* but the files hold tensors of 40 rows"),
        ("num_local_experts", 0, "found 0, expected at least 1"),
        ("vocab_size", -1, "found -1, expected at least"),
        ("num_hidden_layers", -1, "found -1, expected at least 0"),
    ],
)
def test_a_number_that_no_files_hold_is_refused_before_it_is_counted(
    key, value, sentence, mixtral, tmp_path
):
    (mixtral / "config.json").write_text(json.dumps(MIXTRAL_CONFIG | {key: value}))
    with pytest.raises((ConfigError, CheckpointError), match=f"config.json: {key}: {sentence}"):
        import_model(mixtral, out=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_config_is_read_with_the_keys_of_both_versions(tmp_path):
    changes = {
        "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 32},
        "sliding_window": 8,
        "head_dim": 6,
        "num_experts": EXPERTS,
        "made_by": "somebody",
    }
    shapes = mixtral_shapes("fused")
    for name in shapes:
        width = {"q_proj": 24, "k_proj": 12, "v_proj": 12}.get(name.split(".")[-2])
        if width:
            shapes[name] = (width, 16)
        elif "o_proj" in name:
            shapes[name] = (16, 24)
    config = {k: v for k, v in MIXTRAL_CONFIG.items() if k != "num_local_experts"} | changes
    directory = write_directory(tmp_path / "theirs", random_tensors(shapes), config=config)
    found = import_model(directory, out=tmp_path / "ours")
    assert found.model.position.scaling == YaRN(factor=2, original_length=32)
    assert found.model.position.theta == 1e6
    assert found.model.attention.window == SlidingWindow(size=8)
    assert found.model.moe.balance[0].weight == 0.04  # k times the coefficient of theirs
    assert "config.json: nothing here reads made_by" in found.notes


@pytest.mark.parametrize(
    ("theirs", "texts"),
    [
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": 0.6, "repetition_penalty": 1.1, "num_beams": 4}, None),
        ({}, {}),
    ],
)
def test_a_generation_config_is_the_default_of_texts(theirs, texts, mixtral, tmp_path):
    (mixtral / "generation_config.json").write_text(json.dumps(theirs | {"max_new_tokens": 7}))
    found = import_model(mixtral, out=tmp_path / "ours")
    assert ("no search here uses num_beams" in str(found.notes)) == ("num_beams" in theirs)
    kept = read_imported_generation(tmp_path / "ours/imported")
    wanted = {"temperature": 0.6, "repetition_penalty": 1.1} if texts is None else texts
    assert (kept.texts, kept.max_tokens) == (wanted, 7)


LAYERS = {
    **{"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_shared_experts": 1, "kv_lora_rank": 4},
    **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4},
}


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_an_export_promises_no_layers_of_multi_token_prediction(family):
    mapping = FAMILIES[family].mapping
    written = mapping.write(mapping.read(LAYERS | {"num_nextn_predict_layers": 1}))
    assert (written["num_nextn_predict_layers"], written["num_mtp_layers"]) == (0, 0)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers: found 2"):
        mapping.read(LAYERS | {"num_nextn_predict_layers": 2})


def test_no_more_than_a_matrix_or_a_block_is_in_memory(mixtral, tmp_path, monkeypatch):
    read, sizes = TensorFiles.read, []

    def measured(files, region):
        values = read(files, region)
        sizes.append(values.untyped_storage().nbytes())
        return values

    monkeypatch.setattr(TensorFiles, "read", measured)
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 128)
    import_model(mixtral, out=tmp_path / "ours")
    assert max(sizes) == 2 * 16 * HIDDEN  # a matrix of an expert: a fused bank has three pairs


@pytest.mark.parametrize("key", ["num_hidden_layers", "rope_parameters"])
def test_a_value_of_another_kind_in_a_config_is_named(key):
    found = MIXTRAL_CONFIG | {key: ["x"]}
    with pytest.raises(ConfigError, match=rf"{key}=\['x'\]"):
        FAMILIES["mixtral"].mapping.read(found)


def test_a_written_chunk_is_gone_before_the_next_one_is_made(tmp_path):
    alive = []

    def chunks():
        for _ in range(3):
            assert not any(reference() is not None for reference in alive)
            chunk = numpy.zeros(4)
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk

    Disk().write(tmp_path / "file", chunks=chunks())
    assert len(alive) == 3
