from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.serve.sentence_splitting import clause_ends, middle, sentence_ends, word_ends

SPLITTERS = (sentence_ends, clause_ends, word_ends, middle)


def _parts(text, ends):
    return [text[a:b].strip() for a, b in pairwise([0, *ends, len(text)]) if text[a:b].strip()]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Hello there.", "How are you?", "Fine!"],
        ["J. R. R. Tolkien met Dr. Smith at 3.5 km.", "He left."],  # initials, title, number
        ["See e.g. Fig. 3 of vol. 2b.", "It is new."],
        ["Das war am 3. Oktober 1990 in z.B. Bonn.", "Ende."],
        ["Visit http://a.b/c?d=e.f now.", "Then go on."],
        ['She said "Go."', "He went."],
        ["Wait... what? yes.", "OK…", "Then."],  # a small letter goes on with the sentence
        ["Version 2.0.1 is out.", "Get it."],
        ["¿Qué?", "¡Sí!", "Vale."],
        ["Он жил на ул. Ленина.", "Потом уехал."],
        ["今天天气很好。", "我们去公园吧！", "“好的。”", "他说。"],  # no spaces
        ["次の文ですか？", "はい！", "（そうです。）", "終わり"],
        ["यह एक वाक्य है।", "यह दूसरा है॥", "तीसरा?"],
        ["یہ ایک جملہ ہے۔", "دوسرا؟", "ہاں"],
        ["هذا سؤال؟", "نعم.", "لا!"],
        ["ខ្ញុំទៅផ្សារ។", "គាត់មិនទៅ។"],
        ["သူသွားသည်။", "ငါလာသည်။"],
        ["ይህ ነው።", "ሌላ፧"],
        ["Սա է։", "Մյուսը։"],
        ["안녕하세요.", "반갑습니다!"],
        ["ქართული წინადადება.", "მეორე."],
    ],
    ids=lambda sentences: sentences[0][:12],
)
def test_sentences_end_where_their_script_ends_them(sentences):
    spaced = " " if sentences[0][0] not in "今次" else ""
    text = spaced.join(sentences)
    assert _parts(text, sentence_ends(text)) == sentences


def test_scripts_without_such_marks_are_one_sentence():
    for text in ("ฉันไปตลาด เขาไม่ไป", "ຂ້ອຍໄປຕະຫຼາດ", "no full stop here", "3.5", ""):
        assert sentence_ends(text) in ([], [len(text)])


def test_clauses_and_words_end_at_punctuation_and_spaces():
    text = "one, two; three: four — five，六、七 1,000"
    assert _parts(text, clause_ends(text)) == [
        *["one,", "two;", "three:", "four —", "five，", "六、", "七 1,000"]
    ]
    assert _parts("ขอ ไป", word_ends("ขอ ไป")) == ["ขอ", "ไป"]
    assert word_ends("ខ្ញុំ\u200bទៅ") == [6]


@pytest.mark.parametrize("text", ["👨‍👩‍👧👨‍👩‍👧", "e\u0301e\u0301", "ab", "कि" * 3, "🇩🇪🇫🇷"])
def test_the_middle_is_not_inside_a_user_perceived_character(text):
    (end,) = middle(text)
    assert text[end - 1] != "\u200d"
    assert text[end] not in "\u0301\u200dि"
    assert middle("e\u0301") == middle("a") == middle("") == []


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.text(alphabet='ab A.!?。,;、 \u0301")3é…।', max_size=40))
def test_ends_are_increasing_places_within_any_text(text):
    for split in SPLITTERS:
        ends = split(text)
        assert all(a < b for a, b in pairwise([0, *ends]))
        assert all(0 < end <= len(text) for end in ends)


@pytest.mark.parametrize(
    "unit", ["Dr. ", ".", ",", ". ", '."', '"', "。", ", ", "a", "\u0301", "A.) "]
)
def test_the_work_grows_no_faster_than_the_text(unit):
    """A quadratic search of 50,000 units would take minutes: the suite would not end."""
    for split in SPLITTERS:
        split(unit * 50_000)
