import pytest
import torch
import yaml

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.core.errors import CheckpointError, DataError
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import TokenizerConfig, train_tokenizer
from moesaic.evaluate.routing_analysis import RoutingAnalysis, describe_usage, record_routes
from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import Top2
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.serve.translator import TranslationLimits, Translator

LANGUAGES = ("eng_Latn", "deu_Latn", "rus_Cyrl")
TEXTS = ["Open the file", "Save", "Close all of the windows now", "Yes", "Print the page"]


def _config(encoder_layers):
    return ModelConfig(
        vocab_size=400,
        dim=16,
        encoder=Stack(layers=encoder_layers, moe_every=2),
        decoder=Stack(layers=2, moe_every=2),
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForwardConfig(hidden=16),
        moe=MoE(experts=4, select=Top2()),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        {"eng_Latn": TEXTS}, languages=LANGUAGES, config=TokenizerConfig(vocab_size=400)
    )


@pytest.fixture(scope="module", params=[2, 0], ids=["encoder-decoder", "decoder-only"])
def run(request, tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(1)
    config = _config(request.param)
    plain = {
        "name": "tiny",
        "model": config.to_dict(),
        "loader": {"max_source": 12, "max_target": 9},
    }
    folder = RunDir(path)
    path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(yaml.safe_dump(plain))
    model = Transformer(config)
    torch.nn.init.normal_(model.embedding.weight, std=1.0)  # decisive logits: no near ties
    write_tensors(folder.model, tensors=export_weights(model))
    tokenizer.save(folder.tokenizer)
    return path


@pytest.fixture(scope="module")
def translator(run):
    return Translator.open(run)


@pytest.mark.parametrize("search", [Greedy(), Beam(size=3, n_best=2)], ids=["greedy", "beam"])
def test_translating_a_file_equals_translating_its_lines(translator, search):
    together = translator.translate(TEXTS, source="en", target="de", search=search)
    apart = [translator.translate([t], source="en", target="de", search=search)[0] for t in TEXTS]
    assert [t.text for t in together] == [t.text for t in apart]
    assert [t.score for t in together] == pytest.approx([t.score for t in apart], abs=1e-4)


def test_small_batches_keep_the_order(translator):
    small = Translator(
        translator.model,
        tokenizer=translator.tokenizer,
        limits=TranslationLimits(max_target=9, batch_tokens=1),
    )
    large = Translator(
        translator.model, tokenizer=translator.tokenizer, limits=TranslationLimits(max_target=9)
    )
    assert small.translate_texts(TEXTS, source="en", target="ru") == large.translate_texts(
        TEXTS, source="en", target="ru"
    )


def test_empty_lines_stay_empty_and_in_place(translator):
    found = translator.translate_texts(["", "Save", "  ", "Yes"], source="en", target="de")
    assert found[0] == found[2] == ""
    assert found[1:4:2] == translator.translate_texts(["Save", "Yes"], source="en", target="de")
    assert translator.translate_texts([], source="en", target="de") == []
    assert translator.translate_texts([""], source="en", target="de") == [""]


def test_a_line_that_is_too_long_is_truncated_and_marked(translator):
    long = translator.translate(["file " * 60, "Yes"], source="en", target="de")
    assert [t.truncated for t in long] == [True, False]


def test_n_best_translations_are_sorted_by_score(translator):
    found = translator.translate(
        ["Open the file"], source="en", target="de", search=Beam(size=3, n_best=3)
    )[0]
    scores = [a.score for a in found.alternatives]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert found.alternatives[0].text == found.text


def test_the_target_language_changes_the_translation(translator):
    german = translator.translate_texts(TEXTS, source="en", target="de")
    russian = translator.translate_texts(TEXTS, source="en", target="ru")
    assert german != russian


def test_special_tokens_are_never_generated(translator):
    for text in translator.translate_texts(TEXTS * 4, source="en", target="de"):
        assert not any(mark in text for mark in ("<pad>", "<s>", "<mask>", "<unused_", "<deu_"))


def test_an_unknown_language_is_named_with_the_known_ones(translator):
    with pytest.raises(DataError, match=r"has no language \"fr\" \(fra_Latn\).*deu_Latn"):
        translator.translate(["Yes"], source="en", target="fr")
    with pytest.raises(DataError, match="unknown language"):
        translator.translate(["Yes"], source="en", target="dutsch")


def test_every_token_shows_its_experts(translator):
    trace = translator.trace_experts(
        "Open the file", source="en", target="de", translation="Save all"
    )
    sides = [side for side in trace.values() if side["layers"]]
    assert sides
    for side in sides:
        for rows in side["layers"].values():
            assert len(rows) == len(side["tokens"])
            assert all(len(pairs) == 2 for pairs in rows)
            assert all(pairs[0][1] >= pairs[1][1] for pairs in rows)
    assert "Save" in "".join(trace["target"]["tokens"])


def test_usage_counts_every_edge_under_its_language(translator):
    batches = [
        translator.batch(TEXTS, targets=TEXTS, source="en", target=code) for code in ("de", "ru")
    ]
    analysis = RoutingAnalysis(translator.languages)
    for batch in batches:
        analysis.add(record_routes(translator.model, batch))
    counts = analysis.usage
    for layer in counts.layers():
        assert layer.counts.shape == (4, 3)
        assert layer.counts[:, 0].sum() == 0  # English is only the source here
        assert (layer.counts[:, 1:].sum(0) > 0).all()
    assert set(describe_usage(counts)) == {layer.layer for layer in counts.layers()}


def test_a_batch_predicts_the_target_and_its_end(translator):
    batch = translator.batch(TEXTS, targets=TEXTS, source="en", target="de")
    count = sum(len(ids[:9]) + 1 for ids in translator.tokenizer.encode_batch(TEXTS))
    assert batch.num_predicted == count
    assert batch.target_in.shape == batch.target_out.shape


def test_a_missing_file_of_the_run_is_named(run, tmp_path):
    for name in ("tokenizer.json", "model.safetensors"):
        copy = tmp_path / name.split(".")[0]
        copy.mkdir()
        for path in run.iterdir():
            if path.is_file() and path.name != name:
                (copy / path.name).write_bytes(path.read_bytes())
        with pytest.raises(CheckpointError, match=name):
            Translator.open(copy)
    with pytest.raises(CheckpointError, match="no such run"):
        Translator.open(tmp_path / "nowhere")


def test_weights_of_another_config_are_refused(run, tmp_path):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["dim"] = 32
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match="do not fit"):
        Translator.open(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(CheckpointError, match="no model"):
        Translator.open(tmp_path)
