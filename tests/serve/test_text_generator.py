from dataclasses import replace

import pytest

from moesaic.core.errors import DataError
from moesaic.model.config import Stack
from moesaic.model.sampling import Sample
from moesaic.model.transformer import Transformer
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.serve.text_generator import TextGenerator, TextLimits
from serve.language_model_run import CONFIG, write_language_model_run

PROMPTS = ["the end", "", "ten lines\nand", "an"]
LIMITS = TextLimits(max_tokens=20)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    run = write_language_model_run(tmp_path_factory.mktemp("runs") / "small")
    return TextGenerator.open(run.path)


def close(answers):
    """Equal but for the last bits of sums, whose order depends on the number of rows."""
    return [replace(a, log_prob=pytest.approx(a.log_prob, rel=2e-5)) for a in answers]


def test_an_answer_does_not_depend_on_the_other_prompts(generator):
    together = generator.generate(PROMPTS, limits=LIMITS)
    assert [answer.prompt for answer in together] == PROMPTS
    two, one = (generator.generate(PROMPTS[:n], limits=LIMITS) for n in (2, 1))
    assert two == close(together[:2])
    assert one == close(together[:1])
    assert generator.generate(PROMPTS[0], limits=LIMITS) == one[0]
    assert len({a.text for a in generator.generate(["an"] * 4, limits=LIMITS)}) > 1
    other = generator.generate(PROMPTS, search=Sample(seed=1), limits=LIMITS)
    assert [a.text for a in other] != [a.text for a in together]


def test_streamed_pieces_are_the_texts(generator):
    pieces: dict[int, list[str]] = {}
    answers = generator.generate(
        PROMPTS, limits=LIMITS, on_text=lambda row, text: pieces.setdefault(row, []).append(text)
    )
    assert {row: "".join(found) for row, found in pieces.items()} == {
        row: answer.text for row, answer in enumerate(answers) if answer.text
    }
    assert max(map(len, pieces.values())) > 5


def test_a_text_ends_before_a_stop_string(generator):
    (whole,) = generator.generate(["the end"], limits=LIMITS)
    stop = whole.text[3:6]
    (cut,) = generator.generate(["the end"], limits=TextLimits(max_tokens=20, stop=("~~", stop)))
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert (cut.ended, whole.ended) == ("stop", "length")
    assert cut.num_tokens < whole.num_tokens == 20


def test_a_prompt_keeps_white_space_at_its_end(generator):
    assert generator.generate("a \r\n\tb:\n ", limits=LIMITS).prompt == "a\n\tb:\n "


def test_the_language_must_be_one_of_the_model(generator):
    english = generator.generate("an end", limits=LIMITS)
    assert generator.generate("an end", limits=LIMITS, language="en") == english
    assert generator.generate("an end", limits=LIMITS, language="German") != english
    with pytest.raises(DataError, match="no language"):
        generator.generate("an end", language="fr")


def test_a_long_prompt_leaves_room_for_an_answer(generator):
    config = CONFIG.replace(position=LearnedPositions(max_length=24))
    bounded = TextGenerator(Transformer(config), tokenizer=generator.tokenizer)
    (answer,) = bounded.generate(["the end of lines " * 20], limits=TextLimits(max_tokens=8))
    assert answer.skipped > 20
    assert answer.num_tokens > 0


def test_a_model_with_an_encoder_is_refused(generator):
    config = CONFIG.replace(encoder=Stack(layers=1, moe_every=0))
    with pytest.raises(DataError, match="moesaic translate RUN"):
        TextGenerator(Transformer(config), tokenizer=generator.tokenizer)
