import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer
from moesaic.serve.text_stream import TextStream

LINES = ["the end of the text", "an end", "ten\nlines", "a tent"]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer({"eng_Latn": LINES}, ["eng_Latn"], TrainedTokenizer(vocab_size=300))


def cut(text: str, stop) -> str:
    """Character by character: the first end of a stop string."""
    for end in range(len(text) + 1):
        words = [word for word in stop if text[:end].endswith(word)]
        if words:
            return text[: end - max(map(len, words))]
    return text


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text("aent の", max_size=6),
    text=st.text("ehndt \nあいé😀", max_size=25),
    stop=st.lists(st.text("end \nあé", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_are_the_text_before_the_first_stop(prompt, text, stop):
    ids, begun = tokenizer().encode(prompt + text), tokenizer().encode(prompt)
    if ids[: len(begun)] != begun:  # a piece spans the border: it is no continuation
        return
    stream = TextStream(tokenizer(), prompt=begun, stop=stop)
    pieces = [stream.add(token) for token in ids[len(begun) :]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == cut(text, stop)
    assert stream.stopped == any(word in text for word in stop)


def test_a_character_is_never_shown_in_parts():
    ids = tokenizer().encode("é😀")
    assert len(ids) > 4  # bytes
    stream = TextStream(tokenizer(), prompt=tokenizer().encode("a"))
    shown = [stream.add(token) for token in tokenizer().encode("aé😀")[-len(ids) + 1 :]]
    assert [piece for piece in shown if piece] == ["é", "😀"]


def test_bytes_that_are_no_character_are_shown_in_the_end():
    bad = tokenizer().encode("😀")[-4]  # the first of four bytes
    stream = TextStream(tokenizer(), prompt=tokenizer().encode("a"))
    assert stream.add(bad) == ""
    assert stream.finish() == "\ufffd"
    long = TextStream(tokenizer(), prompt=tokenizer().encode("a"))
    assert "".join(long.add(bad) for _ in range(20)).startswith("\ufffd")
