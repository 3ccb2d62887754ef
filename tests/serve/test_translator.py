import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from moesaic.checkpoint import stored_weights
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.checkpoint.trained_directions import TrainedDirections, TrainedStream
from moesaic.core.errors import CheckpointError, DataError
from moesaic.corpus.text_rules import SoftwareStrings
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer
from moesaic.evaluate.routing_analysis import RoutingAnalysis, describe_usage, record_routes
from moesaic.model.beam_search import Beam, Greedy
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.generate import DecodingRules
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import Top2
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.serve.load_model import load
from moesaic.serve.long_text import Truncate
from moesaic.serve.source_text import TranslationLimits
from moesaic.serve.translation_result import TranslationResult, describe_results
from moesaic.serve.translator import Translator

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
        {"eng_Latn": TEXTS}, languages=LANGUAGES, config=TrainedTokenizer(vocab_size=400)
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


def test_a_loaded_model_translates_and_scores_as_the_translator(run, translator):
    model, how = load(run), {"source": "en", "target": "de"}
    assert model.translate(TEXTS, **how) == translator.translate(TEXTS, **how)
    if not model.model.config.encoder.layers:
        return
    with pytest.raises(DataError, match="scores texts given sources"):
        model.score(TEXTS)
    scores = model.score(TEXTS, sources=TEXTS, direction=("en", "de"))
    with torch.inference_mode():
        output = translator.model(translator.batch(TEXTS, targets=TEXTS, **how))
        logs = translator.model.predict(output.hidden).log_softmax(-1)
    for row, score in enumerate(scores):
        own = output.row == row
        wanted = logs[own].gather(1, output.label[own, None]).sum().item()
        assert score == pytest.approx(wanted, rel=1e-5)


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


def _with_limits(translator, **limits):
    return Translator(
        translator.model,
        tokenizer=translator.tokenizer,
        limits=replace(translator.limits, **limits),
        text_rules=SoftwareStrings(),
    )


def test_a_long_text_is_the_joined_translations_of_its_sentences(translator):
    sentences = ["Open the file.", "Save!", "Print the page?"] * 4
    text = " ".join(sentences)
    for search in (Greedy(), Beam(size=3, n_best=2)):
        long, short = translator.translate([text, "Yes"], source="en", target="de", search=search)
        parts = [
            p
            for sentence in sentences
            for p in translator.translate([sentence], source="en", target="de", search=search)
        ]
        assert long.text == " ".join(p.text for p in parts if p.text)
        assert (long.parts, short.parts) == (sum(p.parts for p in parts), 1)
        assert not long.truncated
        assert len(long.alternatives) == (1 if search == Greedy() else 2)


def test_a_text_without_a_sentence_end_is_cut_and_says_so(translator):
    cut, short = translator.translate(["file " * 60, "Yes"], source="en", target="de")
    assert cut.parts > 2
    assert cut.forced_cuts == cut.parts - 1
    assert (short.parts, short.forced_cuts) == (1, 0)


def test_a_long_text_can_be_truncated_instead(translator):
    reader = _with_limits(translator, long_text=Truncate())
    long = reader.translate(["file " * 60, "Yes"], source="en", target="de")
    assert [t.truncated for t in long] == [True, False]
    assert [t.parts for t in long] == [1, 1]


def test_no_row_is_longer_than_any_in_training(translator, monkeypatch):
    """Training keeps rows of at most max_source and max_target tokens, special ones included."""
    seen = []
    model, limits = translator.model, translator.limits
    original = model.step

    def step(ids, cache):
        seen.append(int((cache.length + ids.lengths).max()))
        return original(ids, cache)

    encoded = []
    original_encode = model.encode
    monkeypatch.setattr(model, "step", step)
    monkeypatch.setattr(model, "encode", lambda s: encoded.append(s.width) or original_encode(s))
    wide = _with_limits(translator, max_length_ratio=100.0)
    never_ends, vocabulary = Greedy(), translator.tokenizer.vocabulary
    monkeypatch.setattr(wide, "_rules", DecodingRules(vocabulary, (vocabulary.eos,)))
    texts = ["file " * 60, "Open the file " * 3, "Yes"]
    results = wide.translate(texts, source="en", target="de", search=never_ends)
    assert not any(t.finished for t in results)
    # the last token of an output is not read again
    assert max(seen) == limits.max_target
    if model.config.encoder.layers:
        assert max(encoded) <= limits.max_source
    batch = translator.batch(texts, targets=["file " * 60] * 3, source="en", target="de")
    assert batch.target.width == batch.labels.shape[1] <= limits.max_target
    assert batch.source.width <= limits.max_source


def test_learned_positions_lower_the_limits(tokenizer):
    config = _config(2).replace(position=LearnedPositions(max_length=7))
    narrow = Translator(Transformer(config), tokenizer=tokenizer)
    assert (narrow.limits.max_source, narrow.limits.max_target) == (7, 7)
    assert narrow.translate("file " * 60, source="en", target="de").parts > 2


def test_one_string_has_one_answer(translator):
    one = translator.translate("Open the file", source="en", target="de")
    assert isinstance(one, TranslationResult)
    assert [one] == translator.translate(["Open the file"], source="en", target="de")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["Yes", None], "text 2 is None"),
        ([3.5], "text 1 is 3.5"),
        ([b"Yes"], "text 1 is b'Yes'"),
        (None, "found None"),
        (b"Yes", "found b'Yes'"),
        (7, "found 7"),
    ],
)
def test_what_is_no_text_is_named(translator, texts, message):
    with pytest.raises(DataError, match=message):
        translator.translate(texts, source="en", target="de")
    with pytest.raises(DataError, match=message):
        translator.translate_texts(texts, source="en", target="de")
    with pytest.raises(DataError, match="found 'Yes', expected a list"):
        translator.translate_texts("Yes", source="en", target="de")


SAME = {  # each is cleaned to "Café is open now" in training
    "decomposed": "Cafe\u0301 is open now",
    "soft hyphen": "Ca\u00adfé is op\u00aden now",
    "NUL": "Café is\x00 open now",
    "byte-order mark": "\ufeffCafé is open now",
    "newline": "Café\nis open\r\nnow\n",
    "no-break space": "Café\u00a0is open\u202fnow",
    "line separator": "Café\u2028is open now\x85",
    "runs of space": "  Café \t is   open now ",
}
SAME_IN_SOFTWARE = {
    "tags": "<b>Café is open now</b>",
    "accelerator": "_Café is open now",
    "entity": "Café&nbsp;is open now",
}


@pytest.mark.parametrize("kind", [*SAME, *SAME_IN_SOFTWARE])
def test_text_is_read_as_the_corpus_of_the_run_has_it(translator, kind):
    text = (SAME | SAME_IN_SOFTWARE)[kind]
    plain = "Café is open now"
    software = _with_limits(translator)
    general = Translator(translator.model, tokenizer=translator.tokenizer, limits=translator.limits)
    how = {"source": "en", "target": "de"}
    assert software.translate(text, **how) == software.translate(plain, **how)
    same = general.normalise(text) == plain
    assert same == (kind in SAME)  # without the rules of software strings, markup is text
    assert (general.translate(text, **how) == general.translate(plain, **how)) >= same


@pytest.mark.parametrize(
    "text", ["\u200b", "\ufeff", "\x00", "\u00ad", " \u3000\u00a0", "\u2028", ""]
)
def test_a_text_without_anything_visible_stays_empty(translator, text):
    found = translator.translate([text, "Yes"], source="en", target="de")
    assert (found[0].text, found[0].alternatives) == ("", ())
    assert found[1].text == translator.translate("Yes", source="en", target="de").text
    batch = translator.batch([text, "Yes"], targets=["a", "b"], source="en", target="de")
    assert batch.target.rows == 2


def test_a_translation_is_one_line(translator, monkeypatch):
    monkeypatch.setattr(translator.tokenizer, "decode", lambda _: "one\ntwo\u2028three\x00 four\r")
    assert translator.translate("Yes", source="en", target="de").text == "one two three four"


def _trained(*pairs):
    streams = tuple(
        TrainedStream(
            task="any", source=a, target=b, rows=rows, valid_rows=0, test_rows=0, share=0.5
        )
        for a, b, rows in pairs
    )
    return TrainedDirections(corpus="c", fingerprint="f", streams=streams)


def test_a_direction_that_was_not_trained_is_said(translator):
    trained = _trained(
        ("deu_Latn", "eng_Latn", 9), ("eng_Latn", "rus_Cyrl", 0), ("rus_Cyrl", "rus_Cyrl", 9)
    )
    knows = Translator(translator.model, tokenizer=translator.tokenizer, trained=trained)
    assert knows.direction_warnings("de", "en") == []
    assert knows.translate("Yes", source="de", target="en").trained is True
    (other_source,) = knows.direction_warnings("ru", "en")
    assert "from rus_Cyrl into eng_Latn" in other_source
    assert "deu_Latn" in other_source
    for target in ("ru", "de"):  # ru: a stream without rows, and denoising
        (never,) = knows.direction_warnings("en", target)
        assert "never trained to translate into" in never
        assert "eng_Latn" in never
        assert knows.translate("Yes", source="en", target=target).trained is False
    assert translator.direction_warnings("ru", "en") == []  # no record
    assert translator.translate("", source="ru", target="en").trained is None


def test_the_source_language_is_the_trained_one_if_none_is_given(translator):
    def default_source(*pairs):
        known = Translator(
            translator.model, tokenizer=translator.tokenizer, trained=_trained(*pairs)
        )
        return known.default_source("ru")

    assert translator.default_source("ru") == "eng_Latn"
    assert default_source(("deu_Latn", "rus_Cyrl", 5)) == "deu_Latn"
    assert default_source(("deu_Latn", "eng_Latn", 5)) == "eng_Latn"
    assert default_source(("deu_Latn", "rus_Cyrl", 5), ("eng_Latn", "rus_Cyrl", 5)) == "eng_Latn"


def test_several_trained_sources_must_be_chosen_from(tokenizer):
    trained = _trained(("deu_Latn", "eng_Latn", 5), ("rus_Cyrl", "eng_Latn", 5))
    known = Translator(Transformer(_config(2)), tokenizer=tokenizer, trained=trained)
    with pytest.raises(DataError, match=r"which language.*deu_Latn, rus_Cyrl"):
        known.default_source("en")


def test_an_answer_that_is_cut_or_loops_is_marked(translator, monkeypatch):
    pieces = [i for i in range(300, 400) if translator.tokenizer.id_to_token(i).isalpha()]
    rest = tuple(i for i in range(translator.model.config.vocab_size) if i != pieces[0])
    monkeypatch.setattr(translator, "_rules", DecodingRules(translator.tokenizer.vocabulary, rest))
    monkeypatch.setattr(translator, "limits", replace(translator.limits, max_target=30))
    found = translator.translate("Yes", source="en", target="de")
    assert (found.finished, found.repeats) == (False, True)
    assert len(list(describe_results([found]))) == 2


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
    limit = translator.limits.max_target - 1
    encoded = translator.tokenizer.encode_batch(TEXTS)
    if translator.model.config.encoder.layers:
        rooms = [limit] * len(TEXTS)
    else:  # source and target are one row
        most = translator.limits.source_tokens(specials=2, decoder_only=True)
        rooms = [limit - min(len(ids), most) - 2 for ids in encoded]
    count = sum(min(len(ids), room) + 1 for ids, room in zip(encoded, rooms, strict=True))
    assert batch.num_predicted == count
    assert batch.target.values.shape == batch.labels.shape


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_names(run, tmp_path, value):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = Translator.open(run).model
    name, weight = next((n, w) for n, w in model.named_parameters() if "experts" in n)
    weight.data.view(-1)[3] = value
    write_tensors(RunDir(tmp_path).model, tensors=export_weights(model))
    with pytest.raises(CheckpointError) as caught:
        Translator.open(tmp_path)
    message = str(caught.value)
    assert name in message
    assert "1 of" in message
    assert ("NaN" if value != value else "infinity") in message


@pytest.mark.parametrize("value", ["48", -3, 1, True, None, [4]])
def test_a_limit_that_is_no_number_of_tokens_is_refused(run, tmp_path, value):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["loader"]["max_source"] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=r"loader\.max_source"):
        Translator.open(tmp_path)


@pytest.mark.parametrize("key", ["dim", "vocab_size"])
def test_a_config_larger_than_the_weights_takes_no_memory(run, tmp_path, monkeypatch, key):
    """Weights are compared on the meta device: torch.empty would take all memory there is."""
    other = RunDir(tmp_path / "run")
    shutil.copytree(run, other.path)
    other.record.unlink(missing_ok=True)
    config = yaml.safe_load(other.config.read_text(encoding="utf-8"))
    config["model"][key] = 1 << 20
    other.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    write_tensors(other.model, tensors=read_tensors(other.model))
    allocated = []
    monkeypatch.setattr(
        stored_weights, "allocate_parameters", lambda model, **_: allocated.append(model)
    )

    with pytest.raises(CheckpointError, match=r"do not fit|far larger model"):
        Translator.open(other.path)

    assert allocated == []
