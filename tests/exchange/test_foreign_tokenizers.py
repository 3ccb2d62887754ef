"""Tokenizers of published kinds give the ids of transformers, SentencePiece and llama.cpp."""

import pytest
from foreign_tokenizers import COMBINING, DIFFICULT, KINDS, write_sentencepiece
from transformers_models import TheirModel

from moesaic.data.imported_tokenizer import FromFile
from moesaic.exchange import compare_with_llama_cpp, stored_prompts
from moesaic.exchange.export_gguf import export_gguf
from moesaic.exchange.import_model import import_model

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
REWRITTEN = {"nllb", "t5"}  # they normalise spaces and characters, so that no text comes back
SPACES_FIRST = tuple(text for text in DIFFICULT if text.startswith(" "))
CHANGED = {"qwen2": COMBINING, "mixtral, version 5": SPACES_FIRST}  # by their rules
IN_LLAMA_CPP = {
    "gpt-2": (),
    "qwen2": COMBINING,
    "llama-bpe": (),
    "gpt-4o": (),
    "mixtral": (),
    "mixtral, version 5": SPACES_FIRST,
}


def imported(path):
    """The tokenizer as a run has it."""
    source = FromFile(path=str(path), tags={})
    return source.make({}, languages=(), notify=lambda _: None)


@pytest.mark.parametrize("name", KINDS)
def test_an_imported_tokenizer_gives_the_ids_and_texts_of_transformers(name, tmp_path):
    KINDS[name](tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), imported(tmp_path)
    assert len(DIFFICULT) == 50
    for text in DIFFICULT:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        if name not in REWRITTEN:
            assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
            assert ours.decode(ids) == text or text in CHANGED.get(name, ())


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (
            "tokenizer.model",
            {
                "model_type": "bpe",
                "vocab_size": 420,
                "byte_fallback": True,
                "split_digits": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
            },
        ),
        ("spiece.model", {"vocab_size": 170, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    ],
)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(file, settings, tmp_path):
    pytest.importorskip("sentencepiece", reason="needs SentencePiece")
    theirs = write_sentencepiece(tmp_path / file, **settings)
    ours = imported(tmp_path)
    for text in DIFFICULT:
        assert ours.encode(text) == theirs.EncodeAsIds(text), text
        if "byte_fallback" in settings:
            assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_splits_texts_as_the_exported_tokenizer(name, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the extra [gguf]")
    pytest.importorskip("xllamacpp", reason="needs the extra [gguf]")
    theirs = TheirModel("Mixtral", {"vocab_size": 512, "num_hidden_layers": 1}).build()
    theirs.save_pretrained(tmp_path / "theirs")
    KINDS[name](tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=tmp_path / "ours")
    notes = export_gguf(tmp_path / "ours", out=tmp_path / "file").notes
    other = IN_LLAMA_CPP[name]
    assert any("llama.cpp" in note for note in notes) == bool(other)
    same = tuple(text for text in DIFFICULT if text not in other)
    monkeypatch.setattr(compare_with_llama_cpp, "SENTENCES", same)
    monkeypatch.setattr(compare_with_llama_cpp, "ANSWER", 1)
    monkeypatch.setattr(stored_prompts, "LENGTHS", (3,))
    found = compare_with_llama_cpp.compare_with_llama_cpp(tmp_path / "file", ours=tmp_path / "ours")
    assert found.texts == found.same_text == len(same)
