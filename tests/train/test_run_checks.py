"""Run checks: each violated rule names both values, and all are reported at once."""

import pytest

from moesaic.core.errors import ConfigError
from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.document_packing import Separated
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM
from moesaic.model.config import Stack
from moesaic.nn.attention import Attention
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.optim.lr_schedule import WSD, Cosine
from moesaic.testing.tiny_models import change_text, synthetic_run, text_of
from moesaic.train.run import Run
from moesaic.train.run_checks import check_run

GOOD = synthetic_run()
LOADER, MODEL = text_of(GOOD).loader, GOOD.model
WRONG = {
    "vocabulary": (
        {"model": MODEL.replace(vocab_size=64)},
        r"model\.vocab_size=64: data\.tokenizer\.vocab_size=400",
    ),
    "unknown-language": ({"languages": ("Germann",)}, r'data\.languages\.0: .*"Germann".*German'),
    "language-twice": ({"languages": ("de", "German")}, r'"German" and "de" are both deu_Latn'),
    "no-encoder": (
        {"model": MODEL.replace(encoder=Stack(layers=0))},
        r"collator=EncoderDecoderCollator needs an encoder",
    ),
    "idle-encoder": (
        {"loader": LOADER.replace(collator=DecoderOnlyCollator())},
        r"model\.encoder\.layers=1 without input",
    ),
    "positions": (
        {"model": MODEL.replace(position=LearnedPositions(max_length=50))},
        r"data\.loader\.max_source=64 is longer than .*max_length=50",
    ),
    "mixer-in-no-block": (
        {"model": MODEL.replace(mixers={"narrow": Attention(heads=1)})},
        r"model\.mixers\.narrow: no block has this mixer \(found the pattern 'attention'\)",
    ),
    "packing": (
        {"mixture": MixtureConfig(tasks=(WeightedTask(task=CausalLM(packing=Separated())),))},
        r"tasks\.0\.task\.packing joins documents for a decoder-only model",
    ),
    "batch": (
        {"loader": LOADER.replace(batch_tokens=100)},
        r"batch_tokens=100 cannot hold .*at least 128",
    ),
    "warmup-into-decay": (
        {"schedule": WSD(warmup=17)},
        r"warmup=17 .*at step 16 \(steps=20, schedule\.decay=0\.2\)",
    ),
    "warmup-past-end": ({"schedule": Cosine(warmup=20)}, r"warmup=20 must be less than steps=20"),
}


def test_a_good_run_passes() -> None:
    check_run(GOOD)


@pytest.mark.parametrize("name", WRONG)
def test_each_violated_rule_names_both_values(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        check_run(change_text(GOOD, **changes))
    assert len(caught.value.problems) == (2 if name == "positions" else 1)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(change_text(GOOD, languages=("xx", "yy"), schedule=WSD(warmup=100)))
    assert len(caught.value.problems) == 3


def test_a_run_round_trips_through_yaml() -> None:
    assert Run.from_yaml(GOOD.to_yaml()) == GOOD


def test_a_misspelt_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"clip_nrom.*clip_norm"):
        Run.from_dict(GOOD.to_dict() | {"clip_nrom": 0.1})
