"""A text begins as the imported tokenizer says: with a special token, or with its own first one."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers_models import MODELS

from moesaic.data.language_tag import NoTag
from moesaic.exchange.hf_directory import find_text_start
from moesaic.exchange.import_model import import_model
from moesaic.model.sampling import Sample
from moesaic.serve.text_generator import TextGenerator, TextLimits

BOS = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]


@pytest.mark.parametrize(
    ("settings", "processor", "start"),
    [
        ({"add_bos_token": True}, None, "bos"),
        ({"add_bos_token": False, "model_max_length": 10**30}, None, "text"),
        ({}, {"type": "ByteLevel"}, "text"),
        ({}, {"type": "TemplateProcessing", "single": BOS}, "bos"),
        ({}, {"type": "TemplateProcessing", "single": BOS[1:]}, "text"),
        ({}, {"type": "Sequence", "processors": [{"single": BOS}]}, "bos"),
        ({}, None, "bos"),
    ],
)
def test_files_of_a_tokenizer_say_how_a_text_begins(settings, processor, start, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    assert find_text_start(tmp_path, {"bos_token_id": 1}) == start
    assert find_text_start(tmp_path / "none", {}) == "eos"


def test_a_continued_text_starts_with_itself_where_training_has_the_end():
    frame = NoTag(start="text").frame(decoder_only=True)
    assert (frame.prompt, frame.text_start) == (("eos",), ())


def test_an_imported_model_continues_texts_as_transformers_does(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    theirs = MODELS["qwen2"].build(vocab_size=260)
    theirs.save_pretrained(tmp_path / "theirs")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<|endoftext|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "theirs/tokenizer.json"))
    import_model(tmp_path / "theirs", out=tmp_path / "ours")
    ours = TextGenerator.open(tmp_path / "ours")
    prompts = ["to be", "A", "not"]
    answers = ours.generate(prompts, search=Sample(temperature=0), limits=TextLimits(max_tokens=9))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.encode(prompt).ids
        found = theirs.generate(
            theirs.dummy_inputs["input_ids"].new_tensor([ids]),
            do_sample=False,
            max_new_tokens=9,
            eos_token_id=0,
            pad_token_id=0,
        )
        assert answer.text == tokenizer.decode(found[0, len(ids) :].tolist())
