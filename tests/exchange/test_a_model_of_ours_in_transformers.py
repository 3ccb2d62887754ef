"""A model trained here in the shape of NLLB-MoE translates in transformers as it does here."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moesaic.core.errors import CheckpointError
from moesaic.exchange.export_model import export_model
from moesaic.exchange.import_model import import_model
from moesaic.exchange.transformers_repairs import repair_forward
from moesaic.model.beam_search import Beam, Greedy
from moesaic.nn.positional_encoding import Sinusoidal
from moesaic.optim.lr_schedule import Constant
from moesaic.recipes.shaped_recipes import nllb_shaped
from moesaic.serve.source_text import TranslationLimits
from moesaic.serve.translator import Translator
from moesaic.testing.tiny_models import synthetic_run, text_of
from moesaic.train.run import Run
from moesaic.train.run_training import train

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
TEXTS = ("kato bela", "domo", "la suno brilas hodiau", "x 12")


def shaped(**changes: Any) -> Run:
    """The recipe on a smaller corpus."""
    recipe, base = nllb_shaped(), synthetic_run(steps=60)
    loader = text_of(base).loader.replace(collator=text_of(recipe).loader.collator)
    model = recipe.model.replace(vocab_size=400, dim=32, **changes)
    data = base.data.replace(loader=loader)
    return base.replace(model=model, data=data, optimizer=recipe.optimizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "nllb-shaped"
    train(shaped(), path)
    return path


def test_translations_of_an_exported_model_are_the_same_in_transformers(run, tmp_path):
    assert export_model(run, out=tmp_path / "theirs").family == "nllb-moe"
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "theirs")
    assert repair_forward(theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=tmp_path / "again")
    before, after = Translator.open(run), Translator.open(tmp_path / "again")
    assert before.languages == after.languages
    source, target = before.languages[:2]
    for beams, search in ((1, Greedy()), (4, Beam(size=4, length_penalty=1.0))):
        mine, again = (
            translator.translate_texts(TEXTS, source=source, target=target, search=search)
            for translator in (before, after)
        )
        wanted = [
            in_transformers(
                theirs,
                tokenizer,
                text,
                languages=(source, target),
                beams=beams,
                suppressed=before.tokenizer.vocabulary.suppressed,
                limits=before.limits,
            )
            for text in TEXTS
        ]
        assert mine == again
        # repeated spaces are one in a text of ours
        assert [t.split() for t in mine] == [t.split() for t in wanted]


def in_transformers(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    languages: Sequence[str],
    beams: int,
    suppressed: Sequence[int],
    limits: TranslationLimits,
) -> str:
    tags = [tokenizer.convert_tokens_to_ids(f"<{code}>") for code in languages]
    ids = tokenizer.encode(text, add_special_tokens=False)
    end = model.config.eos_token_id
    room = limits.new_tokens(len(ids) + 2, prompt=2)
    answer = model.generate(
        torch.tensor([[tags[0], *ids, end]]),
        decoder_input_ids=torch.tensor([[end, tags[1]]]),
        num_beams=beams,
        length_penalty=1.0,
        early_stopping=True,
        do_sample=False,
        max_new_tokens=room,
        suppress_tokens=list(suppressed),
    )
    return tokenizer.decode(answer[0, 2:], skip_special_tokens=True)


def test_a_first_position_that_is_not_behind_the_padding_is_refused(tmp_path):
    run = shaped(position=Sinusoidal(offset=2))
    train(run.replace(steps=1, schedule=Constant()), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"pads with id 0, but .* first position is 2"):
        export_model(tmp_path / "run", out=tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
