"""Encoder-decoders are imported with their tokenizer, and without transformers."""

import io
import json
import shutil

import pytest
from hf_directories import random_tensors, write_directory
from tokenizers import Tokenizer, models, pre_tokenizers

from moesaic.cli.main import main
from moesaic.core.errors import CheckpointError, ConfigError, DataError
from moesaic.exchange.export_model import export_model, find_family, hf_config
from moesaic.exchange.families import FAMILIES
from moesaic.exchange.import_model import import_model
from moesaic.exchange.tensor_table import source_shapes
from moesaic.model.beam_search import Beam, Greedy
from moesaic.serve import score
from moesaic.serve.translator import Translator

NLLB = {
    "model_type": "nllb-moe",
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
SWITCH = {
    "model_type": "switch_transformers",
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 12,
    "num_sparse_encoder_layers": 3,
}


def directory(path, **changes):
    config = NLLB | changes
    family = FAMILIES["nllb-moe"]
    pieces = family.pieces(family.mapping.read(config), layout="per-expert")
    return write_directory(path, random_tensors(source_shapes(pieces)), config=config)


def write_tokenizer(path):
    """A file in the order of NLLB's: roles, pieces, codes of languages, the mask."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh", "eng_Latn", "fra_Latn", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path / "tokenizer.json"))


def test_the_languages_of_a_tokenizer_are_found_and_start_the_answer(tmp_path):
    write_tokenizer(directory(tmp_path / "theirs"))
    found = import_model(tmp_path / "theirs", out=tmp_path / "ours")
    assert found.model.moe.select.scale == 0.8  # of a token dropout of 0.2
    translator = Translator.open(tmp_path / "ours")
    assert translator.languages == ("eng_Latn", "fra_Latn")
    assert translator.normalise("Is <b>x</b> &amp;\n y?") == "Is <b>x</b> &amp; y?"
    batch = translator.batch(["abc"], targets=["de"], source="eng_Latn", target="fra_Latn")
    assert batch.source.values.tolist() == [[12, 4, 5, 6, 2]]
    assert batch.target.values.tolist() == [[2, 13, 7, 8]]
    assert isinstance(
        translator.translate_texts(["abc"], source="eng_Latn", target="fra_Latn")[0], str
    )


GENERATION = {
    "num_beams": 3,
    "length_penalty": 0.6,
    "early_stopping": True,
    "no_repeat_ngram_size": 4,
    "max_length": 21,
    "eos_token_id": [2, 7],
    "forced_bos_token_id": 13,
    "num_beam_groups": 1,
    "diversity_penalty": 0.5,
    "transformers_version": "4.1",
}


def test_a_generation_config_is_the_default_of_translate_and_survives_an_export(
    tmp_path, monkeypatch, capsys
):
    write_tokenizer(directory(tmp_path / "theirs"))
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps(GENERATION))
    found = import_model(tmp_path / "theirs", out=tmp_path / "ours")
    assert found.notes[-1].endswith("no search here uses forced_bos_token_id, diversity_penalty")
    export_model(tmp_path / "ours", out=tmp_path / "back")
    import_model(tmp_path / "back", out=tmp_path / "again")
    for name in ("ours", "again"):
        translator = Translator.open(tmp_path / name)
        assert translator.search == Beam(
            size=3, length_penalty=0.6, early_stopping=True, no_repeat_ngram_size=4
        )
        assert translator.limits.max_target == 20
        assert translator.tokenizer.vocabulary.ends == (2, 7)
        assert 7 not in translator.tokenizer.vocabulary.suppressed
    kept = json.loads((tmp_path / "again/imported/generation_config.json").read_text())
    assert kept == GENERATION
    used = []
    monkeypatch.setattr(
        Translator, "translate", lambda *_, **options: used.append(options["search"]) or []
    )
    words = ["translate", str(tmp_path / "ours"), "--from", "eng_Latn", "--to", "fra_Latn"]
    for more in ([], ["--beam", "2", "--length-penalty", "1"], ["--beam", "1"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
        with pytest.raises(SystemExit):
            main([*words, *more])
    usual = translator.search
    greedy = Greedy(no_repeat_ngram_size=4)
    assert used == [usual, usual.replace(size=2, length_penalty=1.0), greedy]
    used.clear()
    monkeypatch.setattr(
        score, "evaluate", lambda systems, **_: used.append(systems["model"]._search) or 1 / 0
    )
    (tmp_path / "pairs.tsv").write_text("abc\tabc\n")
    words = ["eval", str(tmp_path / "ours"), "--pairs", str(tmp_path / "pairs.tsv"), *words[2:]]
    for more in ([], ["--beam", "2"], ["--beam", "1"]):
        with pytest.raises(ZeroDivisionError):
            main([*words, *more])
    assert used == [usual, Beam(size=2), Greedy()]


def test_every_end_of_a_list_ends_an_answer(tmp_path):
    write_tokenizer(directory(tmp_path / "theirs"))
    translator = Translator.open(import_and_return(tmp_path, ends=[2]))
    best = translator.translate("abc", source="eng_Latn", target="fra_Latn").text
    assert len(best) > 2
    letter = 4 + "abcdefgh".index(best[0])
    shutil.rmtree(tmp_path / "ours")
    other = Translator.open(import_and_return(tmp_path, ends=[2, letter]))
    found = other.translate("abc", source="eng_Latn", target="fra_Latn")
    assert (found.text, found.finished) == ("", True)


def import_and_return(path, *, ends):
    (path / "theirs/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    import_model(path / "theirs", out=path / "ours")
    return path / "ours"


@pytest.mark.parametrize(("key", "value"), [("num_beams", 0), ("eos_token_id", "x"), ("top_p", 2)])
def test_a_damaged_generation_config_is_refused_by_its_key(key, value, tmp_path):
    write_tokenizer(directory(tmp_path / "theirs"))
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {key}"):
        import_model(tmp_path / "theirs", out=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_sentencepiece_model_alone_is_refused_where_its_ids_are_no_rows(tmp_path):
    (directory(tmp_path / "theirs") / "sentencepiece.bpe.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected a tokenizer.json"):
        import_model(tmp_path / "theirs", out=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"moe_eval_capacity_token_fraction": -1.0}, "moe_eval_capacity_token_fraction: found -1"),
        ({"second_expert_policy": "best"}, "second_expert_policy: found .best., expected one of"),
        ({"decoder_ffn_dim": 32}, "encoder_ffn_dim=24, decoder_ffn_dim=32, of which we have one"),
        ({"encoder_layers": 0}, "encoder_layers: found 0"),
        ({"pad_token_id": "x"}, "pad_token_id: found"),
    ],
)
def test_what_an_encoder_decoder_here_does_not_compute_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FAMILIES["nllb-moe"].mapping.read(NLLB | changes)


@pytest.mark.parametrize("key", ["encoder_layers", "decoder_layers", "num_experts"])
def test_an_absurd_number_is_refused_before_it_is_counted(key, tmp_path):
    theirs = directory(tmp_path / "theirs")
    (theirs / "config.json").write_text(json.dumps(NLLB | {key: 10**9}))
    with pytest.raises(CheckpointError, match=f"{key}: found 1,000,000,000, but the files hold"):
        import_model(theirs, out=tmp_path / "ours")


@pytest.mark.parametrize(
    ("number", "layers"),
    [(3, (1, 5, 9)), (6, (1, 3, 5, 7, 9, 11)), (12, tuple(range(12))), (0, (1,))],
)
def test_sparse_layers_of_switch_are_counted_as_in_transformers(number, layers):
    model = FAMILIES["switch_transformers"].mapping.read(
        SWITCH | {"num_sparse_encoder_layers": number}
    )
    assert model.encoder.moe_layers == layers
    family = find_family(model)
    written = family.mapping.read(json.loads(json.dumps(hf_config(family, model))))
    assert written.encoder.moe_layers == layers
