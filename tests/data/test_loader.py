"""The loader: refused configs, skipped rows, and the end of its thread."""

import dataclasses
import threading

import pytest

import pipeline_cases as cases
from moesaic.core.errors import CheckpointError, ConfigError, DataError
from moesaic.data.batch import SOURCE_LANGUAGE, TARGET_LANGUAGE, TASK
from moesaic.data.collators import DecoderOnlyCollator
from moesaic.data.loader import DataReplica, Loader
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer, train_tokenizer


def test_rows_are_pairs_of_the_corpus_with_their_labels():
    stream, tokenizer = cases.loader(), cases.tokenizer()
    for _ in range(20):
        batch = next(stream)
        for i in range(batch.rows):
            target = tokenizer.decode(batch.labels[i, : batch.target.lengths[i]].tolist())
            code = stream.languages[batch.groups[TARGET_LANGUAGE][i]]
            assert batch.target.values[i, 0] == tokenizer.vocabulary.tag(code)
            assert batch.source.values[i, 0] == tokenizer.vocabulary.tag(code)
            number = int(target.removesuffix(" δ").split()[-1])
            assert target.removesuffix(" δ") == cases.sentence(code, number)
            if stream.tasks[batch.groups[TASK][i]] == "translation":
                source = tokenizer.decode(
                    batch.source.values[i, : batch.source.lengths[i]].tolist()
                )
                assert source == cases.sentence("eng_Latn", number)
                assert stream.languages[batch.groups[SOURCE_LANGUAGE][i]] == "eng_Latn"
            else:
                assert batch.groups[SOURCE_LANGUAGE][i] == batch.groups[TARGET_LANGUAGE][i]


def test_denoising_sources_are_corrupted_and_translation_sources_are_not():
    stream = cases.loader()
    masked, mask = dict.fromkeys(stream.tasks, 0), cases.tokenizer().vocabulary.mask
    for _ in range(20):
        batch = next(stream)
        for i in range(batch.rows):
            masked[stream.tasks[batch.groups[TASK][i]]] += int(
                (batch.source.values[i] == mask).any()
            )
        assert not (batch.labels == mask).any()
    assert masked["translation"] == 0
    assert masked["denoising"] > 20


def test_causal_lm_has_no_source_and_its_padding_is_not_counted():
    mixture = MixtureConfig(tasks=(WeightedTask(task=CausalLM()),))
    batch = next(
        cases.loader(mixture=mixture, config=cases.SMALL.replace(collator=DecoderOnlyCollator()))
    )
    assert batch.source.width == 0
    assert batch.num_predicted == batch.num_tokens
    assert next(cases.loader(mixture=mixture)).source.width == 2  # tag and end


def test_overlong_rows_are_skipped_and_counted_by_direction():
    stream = cases.loader(config=cases.SMALL.replace(max_target=12))
    for _ in range(60):
        assert next(stream).target.width <= 12
    assert set(stream.skipped) >= {"eng_Latn-deu_Latn", "deu_Latn-deu_Latn"}
    assert cases.loader().skipped == {}


def test_limits_below_every_row_are_an_error_and_not_a_hang():
    with pytest.raises(DataError, match="max_source=2 and max_target=40; raise them"):
        next(cases.loader(config=cases.SMALL.replace(max_source=2, bucket_window=8)))


def test_a_budget_below_the_longest_row_is_refused():
    with pytest.raises(ConfigError, match=r"batch_tokens: found 60, expected at least .*80"):
        cases.loader(config=cases.SMALL.replace(batch_tokens=60))


def test_state_of_another_run_is_refused():
    state = cases.loader(seed=1).state()
    for other in (
        cases.loader(seed=2),
        cases.loader(config=cases.SMALL.replace(bucket_window=65)),
        cases.loader(mixture=cases.MIXTURE.replace(temperature=3.0)),
    ):
        with pytest.raises(CheckpointError, match="another corpus, tokenizer, mixture, seed"):
            other.restore(state)
    cases.loader(config=cases.SMALL.replace(prefetch=2)).restore(state)


def test_shards_of_another_tokenizer_and_a_rank_out_of_range_are_refused():
    texts = {"eng_Latn": ["a b c"]}
    other = train_tokenizer(texts, cases.LANGUAGES, TrainedTokenizer(vocab_size=300))
    parts = {"mixture": cases.MIXTURE, "config": cases.SMALL, "seed": 1}
    with pytest.raises(DataError, match="another tokenizer"):
        Loader(cases.shards(), tokenizer=other, **parts)
    with pytest.raises(ConfigError, match="rank 2 is not one of 2 ranks"):
        Loader(cases.shards(), tokenizer=cases.tokenizer(), replica=DataReplica(2, 2), **parts)


def test_closing_ends_the_thread_and_the_next_batch_continues():
    stream, plain = cases.loader(config=cases.SMALL.replace(prefetch=2)), cases.loader()
    for _ in range(3):
        assert cases.rows(next(stream)) == cases.rows(next(plain))
        stream.close()
        stream.close()
        assert not any(t.name == "moesaic-data" for t in threading.enumerate())
    assert stream.state() == plain.state()


def test_two_seeds_draw_other_rows():
    first, second = (cases.rows(next(cases.loader(seed=seed))) for seed in (1, 2))
    assert first != second


def test_held_out_rows_are_limited_per_stream_and_never_from_train():
    stream = cases.loader(mixture=MixtureConfig(tasks=(WeightedTask(task=Translation()),)))
    batches = list(stream.held_out_batches("valid", rows=10))
    assert sum(batch.rows for batch in batches) == 10 + 10 + 6
    for batch in batches:
        for row, length in zip(batch.labels.tolist(), batch.target.lengths, strict=True):
            assert int(cases.tokenizer().decode(row[:length]).split()[-1]) >= 1000
    assert list(stream.held_out_batches("test")) == []


def test_batches_are_frozen_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        next(cases.loader()).labels = None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("first", -1),
        ("first", 2**62),
        ("first", 1.5),
        ("batch", True),
        ("batch", None),
        ("counts", []),
        ("counts", 7),
        ("counts", [1]),
        ("skipped", []),
        ("skipped", {"0": 1}),
    ],
)
def test_a_position_out_of_range_is_refused(key, value):
    """Each of these was taken over, and skipped data silently or failed in the first batch."""
    stream = cases.loader()
    next(stream)
    with pytest.raises(CheckpointError, match="data position"):
        cases.loader().restore(stream.state() | {key: value})


@pytest.mark.parametrize("change", ["more skipped than drawn", "counts of other draws"])
def test_a_position_that_contradicts_itself_is_refused(change):
    stream = cases.loader()
    for _ in range(400):
        next(stream)
    state = stream.state()
    assert sum(state["counts"]) == state["first"] > 0
    key = "skipped" if change == "more skipped than drawn" else "counts"
    state[key][0] = state["counts"][0] + 1
    with pytest.raises(CheckpointError, match="data position"):
        cases.loader().restore(state)
