"""Mixture configs: refused values and task names. See also laws/test_mixture_frequencies.py."""

import pytest

import pipeline_cases as cases
from moesaic.core.errors import ConfigError, DataError
from moesaic.data.mixture import Mixture, MixtureConfig, WeightedTask
from moesaic.data.tasks import CausalLM, Denoising, Translation


def mixed(config: MixtureConfig) -> Mixture:
    return Mixture(config, shards=cases.shards(), languages=cases.LANGUAGES, seed=1)


def test_two_tasks_of_one_kind_have_distinct_names():
    tasks = (Denoising(languages=("deu_Latn",)), Denoising(languages=("ell_Grek",)), CausalLM())
    mixture = mixed(MixtureConfig(tasks=tuple(WeightedTask(task=task) for task in tasks)))
    assert mixture.task_names == ("denoising", "denoising-2", "causal-lm")


def test_a_task_without_rows_is_refused_by_name():
    with pytest.raises(DataError, match="task denoising has no training rows"):
        mixed(MixtureConfig(tasks=(WeightedTask(task=Denoising(languages=("fra_Latn",))),)))


@pytest.mark.parametrize(
    ("boost", "message"),
    [({"deu_latn": 2.0}, 'did you mean "deu_Latn"'), ({"deu_Latn": 0.0}, "more than 0")],
)
def test_a_weight_of_an_unknown_language_or_of_zero_is_refused(boost, message):
    with pytest.raises(ConfigError, match=message):
        mixed(MixtureConfig(language_weights=boost))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.5}, {"size_limit": 0}, {"tasks": []}, {"size_unit": "Lines"}]
)
def test_wrong_values_are_refused_with_their_path(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MixtureConfig.from_dict(wrong)


def test_draws_over_size_is_the_number_of_epochs():
    mixture = mixed(MixtureConfig(tasks=(WeightedTask(task=Translation()),)))
    draws = mixture.draw(0, count=840, counts=mixture.initial_counts())
    table = mixture.frequencies(mixture.counts_after(draws, counts=mixture.initial_counts()))
    assert [line.drawn / line.size for line in table] == pytest.approx([2.0, 2.0, 2.0], abs=0.1)
