import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.corpus.placeholders import placeholder_keys
from moesaic.data.copy_units import FIRST_SLOT, CopyUnit, insert_slots, slot_characters
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import BPE, TrainedTokenizer, Unigram, train_tokenizer

A, B, C = slot_characters(3)
PARTS = [
    "%s",
    "%d",
    "%1$s",
    "{name}",
    "{0}",
    "<b>",
    "</b>",
    "\\n",
    "https://x.org/a",
    "a",
    " ",
    "Öl",
]
TEXTS = st.lists(st.sampled_from([*PARTS, A, "\U0010f03f", "{n, plural, one {%s}}"]), max_size=12)


def test_placeholders_become_numbered_slots() -> None:
    found = insert_slots("Open %(name)s in <b>%(dir)s</b>, %(name)s!", slots=8)
    assert found.text == f"Open {B} in {slot_characters(4)[3]}{A}{C}, {B}!"
    assert [unit.text for unit in found.units] == ["%(dir)s", "%(name)s", "</b>", "<b>"]
    assert [unit.count for unit in found.units] == [1, 2, 1, 1]


def test_both_sides_of_a_pair_number_their_slots_alike() -> None:
    source = insert_slots("%(count)d files of {name} at https://x.org", slots=8)
    target = insert_slots("https://x.org: {name} hat %(count)d Dateien", slots=8)
    assert {u.text for u in source.units} == {u.text for u in target.units}
    assert source.restore(target.text) == "https://x.org: {name} hat %(count)d Dateien"


def test_text_beside_a_unit_does_not_become_a_part_of_it() -> None:
    source = insert_slots("Go to https://x.org with %1", slots=8)
    assert source.restore(f"Auf{B}klicken, {A}0") == "Auf https://x.org klicken, %1 0"
    assert source.restore(f"{B}{A}") == "https://x.org %1"
    assert source.restore(f"「{B}」を{A}で") == "「https://x.org」を%1で"


def test_unnumbered_arguments_are_taken_in_order() -> None:
    units = insert_slots("%s has %d of {x} and %s", slots=8).units
    assert units == (
        CopyUnit("%s", 1),
        CopyUnit("%d", 1, after=(0,)),
        CopyUnit("%s", 1, after=(1,)),
        CopyUnit("{x}", 1),
    )
    numbered = insert_slots("%2$d of %1$s", slots=8).units
    assert numbered == (CopyUnit("%1$s", 1), CopyUnit("%2$d", 1))


def test_a_closing_tag_comes_after_its_opening_tag() -> None:
    text = '<a href="x">{% if y %}[b]z[/b]{% endif %}</a><br/></br>'
    units = {unit.text: unit for unit in insert_slots(text, slots=9).units}
    order = [unit.text for unit in insert_slots(text, slots=9).units]
    before = {text: [order[i] for i in unit.after] for text, unit in units.items() if unit.after}
    assert before == {"</a>": ['<a href="x">'], "{% endif %}": ["{% if y %}"], "[/b]": ["[b]"]}


def test_slot_characters_of_a_text_are_units() -> None:
    found = insert_slots(f"{B} and %s", slots=4)
    assert found.text == f"{A} and {B}"
    assert [unit.text for unit in found.units] == [B, "%s"]
    assert insert_slots(f"{A}{B} %s", slots=1).units == ()


def test_more_placeholders_than_slots_stay_text() -> None:
    assert insert_slots("{a} {b} {c}", slots=2).text == f"{A} {B} {{c}}"
    assert insert_slots("{a}", slots=0).text == "{a}"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(TEXTS, st.integers(0, 4))
def test_slots_lose_nothing(parts: list[str], slots: int) -> None:
    text = "".join(parts)
    found = insert_slots(text, slots=slots)
    assert found.restore(found.text) == text
    own = sum(ord(c) >= FIRST_SLOT for c in text)
    assert sum(unit.count for unit in found.units) <= len(placeholder_keys(text)) + own


@pytest.fixture(scope="module", params=[BPE(), Unigram()], ids=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    lines = ["Open %s in %(name)s now", "Save the file", "in the house of cards", "{0} now"] * 3
    config = TrainedTokenizer(vocab_size=330, copy_units=4, algorithm=request.param)
    return train_tokenizer({"eng_Latn": lines}, ["eng_Latn"], config)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(TEXTS)
def test_encoding_with_copies_and_without_them_are_the_identity(
    tokenizer: Tokenizer, parts: list[str]
) -> None:
    text = "".join(parts)
    [encoded] = tokenizer.encode_with_copies([text])
    assert tokenizer.decode(encoded.ids, encoded.slotted) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_slot_is_one_token_with_and_without_a_space(tokenizer: Tokenizer) -> None:
    [encoded] = tokenizer.encode_with_copies(["%s in<b>"])
    copies = dict(zip(tokenizer.copies.ids, tokenizer.copies.slot_of, strict=True))
    assert [copies[i] for i in encoded.ids if i in copies] == [0, 1]
    assert tokenizer.id_to_token(encoded.ids[0]) == " " + A
    assert tokenizer.id_to_token(encoded.ids[-1]) == B
    assert tokenizer.copies.slots == 4


def test_no_learned_piece_is_spent_on_a_placeholder(tokenizer: Tokenizer) -> None:
    names = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    assert not [name for name in names if "%" in name or "{" in name]


def test_copies_are_saved_with_the_tokenizer(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").copies == tokenizer.copies


def test_without_copy_units_placeholders_are_text() -> None:
    tokenizer = train_tokenizer(
        {"eng_Latn": ["Open %s"] * 4}, ["eng_Latn"], TrainedTokenizer(vocab_size=300)
    )
    [encoded] = tokenizer.encode_with_copies(["Open %s"])
    assert encoded.ids == tokenizer.encode("Open %s")
    assert encoded.slotted.units == ()
    assert tokenizer.copies.ids == ()
