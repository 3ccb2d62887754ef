"""Pairs as rows, task prompts, and the tags of tasks."""

import numpy as np
import pytest

import pipeline_cases as cases
from moesaic.core.errors import DataError
from moesaic.data.batch import IGNORE_LABEL
from moesaic.data.batch_stream import DataReplica, LoaderConfig
from moesaic.data.collators import EncoderDecoderCollator, PairCollator
from moesaic.data.language_tag import TaskPrompt
from moesaic.data.loader import Loader
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Denoising, Translation

TASKS = MixtureConfig(tasks=(WeightedTask(task=Translation()), WeightedTask(task=Denoising())))

ALONE = DataReplica()


def loader(collator, *, replica=ALONE, mixture=TASKS):
    config = LoaderConfig(batch_tokens=256, max_source=64, max_target=64, collator=collator)
    return Loader(
        cases.shards(),
        tokenizer=cases.tokenizer(),
        mixture=mixture,
        config=config,
        seed=1,
        replica=replica,
    )


def test_a_pair_is_two_rows_each_between_its_tag_and_the_end():
    mixture = MixtureConfig(tasks=(WeightedTask(task=Translation()),))
    with loader(PairCollator(), mixture=mixture) as data:
        batch = next(data)
    vocabulary = cases.tokenizer().vocabulary
    assert batch.labels.tolist() == [0, IGNORE_LABEL] * (batch.rows // 2)
    assert len(set(batch.key.tolist())) == batch.rows
    languages = cases.tokenizer().languages
    for row in range(batch.rows):
        ids = batch.target.values[row, : batch.target.lengths[row]].tolist()
        side = "source_language" if row % 2 == 0 else "target_language"
        code = languages[int(batch.groups[side][row])]
        assert (ids[0], ids[-1]) == (vocabulary.tag(code), vocabulary.eos)


@pytest.mark.parametrize("ranks", [2, 3])
def test_both_rows_of_a_pair_are_on_one_rank(ranks):
    with loader(PairCollator()) as whole:
        expected = next(whole)
    parts = []
    for rank in range(ranks):
        with loader(PairCollator(), replica=DataReplica(rank, ranks)) as data:
            parts.append(next(data))
    found = sorted(k for part in parts for k in part.key.tolist())
    assert found == sorted(expected.key.tolist())
    for part in parts:
        assert part.key[1::2].tolist() == (~part.key[::2]).tolist()


def test_a_task_prompt_needs_a_tokenizer_with_tags_for_the_tasks():
    with (
        pytest.raises(DataError, match="task:translation"),
        loader(EncoderDecoderCollator(tag=TaskPrompt())) as data,
    ):
        next(data)


def test_a_prompt_starts_with_the_task_then_the_language():
    frames = [TaskPrompt().frame(decoder_only=only) for only in (False, True)]
    assert [frame.source_start for frame in frames] == [("task", "target"), ("task", "source")]
    assert [frame.prompt for frame in frames] == [("target",), ("task", "target")]
    assert np.all([frame.source_specials == 3 for frame in frames])
