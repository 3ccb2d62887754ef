"""Tasks: the streams that they read, and round trips as config."""

import pytest

import pipeline_cases as cases
from moesaic.core.errors import ConfigError
from moesaic.data.mixture import MixtureConfig
from moesaic.data.tasks import CausalLM, Denoising, Translation
from moesaic.data.text_noise import InfillSpans


@pytest.mark.parametrize("task", [Denoising(), CausalLM()], ids=["denoising", "causal-lm"])
def test_tasks_on_one_language_read_every_text_of_each(task):
    streams = task.streams(cases.shards(), languages=cases.LANGUAGES, split="train")
    assert {s.target_language: s.size for s in streams} == {
        "deu_Latn": 300,
        "ell_Grek": 110,
        "eng_Latn": 300,
        "jpn_Jpan": 30,
    }
    assert all(s.source_language == s.target_language for s in streams)


def test_a_mixture_round_trips_as_yaml():
    text = """
    tasks:
    - {task: Translation, weight: 3}
    - {task: {kind: Denoising, noise: [InfillSpans]}, weight: 1}
    temperature: 2
    size_unit: TokenCount
    """
    config = MixtureConfig.from_yaml(text)
    assert config.tasks[0].task == Translation()
    assert config.tasks[1].task == Denoising(noise=(InfillSpans(),))
    assert MixtureConfig.from_yaml(config.to_yaml()) == config


def test_a_misspelt_task_names_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "Denoising"'):
        MixtureConfig.from_dict({"tasks": [{"task": "Denoisng"}]})
