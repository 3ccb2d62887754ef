"""Tokenizers of other models: roles found or given, text encoded as their own library does."""

import json

import pytest
from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.errors import DataError
from moesaic.data.id_map import FairseqIds, MappedIds
from moesaic.data.imported_tokenizer import FromFile
from moesaic.data.tokenizer import Tokenizer
from tokenizer_files import TEXTS, byte_level, word_piece, write_sentencepiece

LANGUAGES = ("deu_Latn", "eng_Latn")


def imported(path, notes=None, **given) -> Tokenizer:
    source = FromFile(path=str(path), **given)
    return source.make({}, languages=LANGUAGES, notify=(notes if notes is not None else []).append)


def test_settings_that_would_change_rows_are_left_out_and_named(tmp_path):
    notes: list[str] = []
    path = byte_level(tmp_path / "tokenizer.json")
    tokenizer = imported(path, notes)
    assert [note.split(" is left out")[0] for note in notes] == [
        "tokenizer.json: its truncation",
        "tokenizer.json: its padding",
    ]
    theirs = HfTokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.no_padding()
    long = " ".join(TEXTS[:9])
    assert tokenizer.encode(long) == theirs.encode(long).ids
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_the_end_may_pad_and_id_0_is_a_word(tmp_path):
    vocabulary = imported(byte_level(tmp_path / "tokenizer.json")).vocabulary
    assert vocabulary.eos == vocabulary.pad
    assert vocabulary.roles.keys() == {"eos", "pad"}
    assert vocabulary.suppressed == ()
    assert imported(tmp_path / "tokenizer.json").encode("!") == [0]
    with pytest.raises(DataError, match=r"no mask token, which noise needs.*data\.tokenizer\.mask"):
        vocabulary.role("mask", needed_by="noise")


def test_a_template_of_special_tokens_is_left_out_and_gaps_are_never_generated(tmp_path):
    tokenizer = imported(word_piece(tmp_path / "tokenizer.json"))
    vocabulary = tokenizer.vocabulary
    assert vocabulary.roles == {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}
    ids = tokenizer.encode("An END [SEP]")
    assert not set(ids) & {0, 2, 3, 4}
    assert tokenizer.decode(tokenizer.encode("an end")) == "an end"
    gap = range(vocabulary.size - 4, vocabulary.size - 1)
    assert set(gap) < set(vocabulary.suppressed)


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_sentencepiece_model_segments_by_its_scores(tmp_path, byte_fallback):
    path = write_sentencepiece(tmp_path / "a.model", byte_fallback=byte_fallback)
    tokenizer = imported(path)
    pieces = [tokenizer.id_to_token(i) for i in tokenizer.encode("  the   end t\u4e2d")]
    fallback = ["<0xE4>", "<0xB8>", "<0xAD>"] if byte_fallback else ["<unk>"]
    assert pieces == ["\u2581the", "\u2581end", "\u2581", "t", *fallback]
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"
    assert tokenizer.vocabulary.roles == {"unk": 0, "bos": 1, "eos": 2}


def test_a_marker_that_is_typed_is_no_marker(tmp_path):
    tokenizer = imported(write_sentencepiece(tmp_path / "a.model"))
    assert tokenizer.vocabulary.eos not in tokenizer.encode("the </s> end")


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_marker_that_is_typed_is_spelled_by_its_characters(tmp_path, byte_fallback):
    tokenizer = imported(write_sentencepiece(tmp_path / "a.model", byte_fallback=byte_fallback))
    ids = tokenizer.encode("the </s> end")
    assert not {*tokenizer.vocabulary.suppressed} & {*ids} - {tokenizer.vocabulary.unk}
    if byte_fallback:
        assert tokenizer.decode(ids) == "the </s> end"


def test_a_saved_tokenizer_is_the_same_with_its_record(tmp_path):
    tokenizer = imported(write_sentencepiece(tmp_path / "a.model"), added_tags=LANGUAGES)
    tokenizer.save(tmp_path / "run.json")
    (tmp_path / "run.json").rename(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.fingerprint, again.languages) == (tokenizer.fingerprint, LANGUAGES)
    assert again.vocabulary == tokenizer.vocabulary
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    (tmp_path / "tokenizer.json").write_text(byte_level(tmp_path / "b.json").read_text())
    with pytest.raises(DataError, match="belongs to another tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_fairseqs_rows_are_four_roles_and_then_the_ids_of_the_file(tmp_path):
    path = write_sentencepiece(tmp_path / "a.model")
    plain = imported(path, added_tags=LANGUAGES)
    theirs = imported(path, added_tags=LANGUAGES, id_map=FairseqIds())
    assert theirs.vocabulary.roles == {"bos": 0, "pad": 1, "eos": 2, "unk": 3}
    assert theirs.vocabulary.id_map[:4] == (3, 0, 2, 4)  # of <unk>, <s>, </s> and the first piece
    assert theirs.vocab_size == plain.vocab_size + 1
    tags = {code: tag + 1 for code, tag in plain.vocabulary.tags.items()}
    assert theirs.vocabulary.tags == tags
    assert theirs.vocabulary.suppressed == (0, 1, 3, *tags.values())
    known = [[i + 1 if i else 3 for i in ids] for ids in plain.encode_batch([*TEXTS, "the Z"])]
    assert theirs.encode_batch([*TEXTS, "the Z"]) == known
    assert [theirs.encode(text) for text in TEXTS] == known[:-1]
    assert theirs.decode([1, *theirs.encode("the end"), 2]) == "the end"
    names = [theirs.id_to_token(i) for i in (0, 1, 3, tags["eng_Latn"])]
    assert names == ["<s>", "<1?>", "<unk>", "<eng_Latn>"]
    with pytest.raises(ValueError, match="expected each role once"):
        FairseqIds(first=("eos", "eos"))


def test_a_list_has_the_row_of_each_id_and_more_tokens_follow(tmp_path):
    path, rows = byte_level(tmp_path / "tokenizer.json"), tmp_path / "rows.json"
    plain = imported(path)
    order = [2 * i + 1 for i in reversed(range(plain.vocab_size))]
    rows.write_text(json.dumps(order))
    source = {"id_map": MappedIds(path=str(rows)), "added_tags": ("denoise",)}
    theirs = imported(path, **source)
    assert theirs.encode(TEXTS[0]) == [order[i] for i in plain.encode(TEXTS[0])]
    assert theirs.decode(theirs.encode(TEXTS[0])) == TEXTS[0]
    assert theirs.vocabulary.eos == order[plain.vocabulary.eos]
    assert theirs.vocabulary.tags == {"denoise": max(order) + 1}
    assert set(range(0, max(order), 2)) < set(theirs.vocabulary.suppressed)  # rows of no token
    theirs.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.vocabulary, again.fingerprint) == (theirs.vocabulary, theirs.fingerprint)
    assert again.encode_batch(TEXTS[:9]) == theirs.encode_batch(TEXTS[:9])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: [*rows[:-1], 0], r"row 0 for the ids 0 and \d+: .*a row of its own"),
        (lambda rows: [-1, *rows[1:]], "id 0 has the row -1, expected 0 to"),
        (lambda rows: [True, *rows[1:]], "id 0 has the row true, expected 0 to"),
        (lambda rows: rows[1:], r"found \d+ rows, expected one for each id of the tokenizer: \d+"),
        (lambda rows: {"rows": rows}, "expected a list of rows"),
    ],
)
def test_a_list_of_rows_that_is_none_says_why(tmp_path, change, reason):
    path, rows = byte_level(tmp_path / "tokenizer.json"), tmp_path / "rows.json"
    rows.write_text(json.dumps(change(list(range(imported(path).vocab_size)))))
    with pytest.raises(DataError, match=reason):
        imported(path, id_map=MappedIds(path=str(rows)))


def test_tags_are_found_given_or_added(tmp_path):
    path = byte_level(tmp_path / "a.json", specials=("<|endoftext|>", "__de__", "~~"))
    assert imported(path).vocabulary.tags == {"deu_Latn": imported(path).vocabulary.eos + 1}
    found = imported(path, tags={"eng_Latn": "~~"}, added_tags=("denoise",)).vocabulary
    assert list(found.tags) == ["eng_Latn", "deu_Latn", "denoise"]
    assert found.size == imported(path).vocabulary.size + 1
    for given, reason in (
        ({"tags": {"eng_Latn": "no"}}, "has no token 'no'"),
        ({"added_tags": ("deu_Latn",)}, "a tag for deu_Latn already"),
        ({"eos": "<end>"}, "has no token '<end>'"),
    ):
        with pytest.raises(DataError, match=reason):
            imported(path, **given)


def test_the_end_must_be_known_and_the_only_one(tmp_path):
    path = byte_level(tmp_path / "tokenizer.json", specials=("<|endoftext|>", "</s>"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"several.*</s>, <\|endoftext\|>.*tokenizer\.eos=TOKEN"):
        imported(path)
    assert imported(path, eos="</s>").vocabulary.eos == imported(path, eos="</s>").vocab_size - 1
    none = byte_level(tmp_path / "b.json", specials=("x",))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "gone"}))
    with pytest.raises(DataError, match="no token is known to be the end"):
        imported(none)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": 3}, "words or characters"),
        ({"control": [("<s>", 3), ("<s>", 3)]}, "a piece twice"),
        ({"control": [("<s>", 9)]}, "unknown type 9"),
    ],
)
def test_a_sentencepiece_model_that_is_not_supported_says_why(tmp_path, changes, reason):
    with pytest.raises(DataError, match=reason):
        imported(write_sentencepiece(tmp_path / "a.model", **changes))


def test_a_folder_has_one_of_the_files(tmp_path):
    with pytest.raises(DataError, match=r"neither a tokenizer\.json nor a \.model"):
        imported(tmp_path)
    write_sentencepiece(tmp_path / "spm.model")
    assert imported(tmp_path).vocabulary.eos == 2
    with pytest.raises(DataError, match="no such file"):
        imported(tmp_path / "none.json")
