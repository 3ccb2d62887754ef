"""Configs of an earlier version: their old names are listed, and upgraded to equal configs."""

import re

import pytest

from moesaic.core.config import Choice, Config
from moesaic.core.config_text import iter_leaves
from moesaic.core.config_upgrade import (
    MOVED_KEYS,
    RENAMED_KEYS,
    RENAMED_KINDS,
    SECTIONS,
    upgrade_config,
)
from moesaic.core.errors import ConfigError
from moesaic.distributed.launchers import Slurm
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.parallel.config import ParallelConfig
from moesaic.recipes.lookup import RECIPES
from moesaic.train.run import Run

OLD = {
    "accumulate": 2,
    "corpus": {"kind": "Catalogue", "name": "Catalogue"},
    "log": {"routes_every": 5, "also": ["TensorBoard"]},
    "spikes": {"kind": "SkipSpikes", "lasting": 3},
    "schedule": {"kind": "WSD", "shape": "Linear"},
}
NEW = {
    "gradient_accumulation_steps": 2,
    "data": {"kind": "TextData", "corpus": {"kind": "NamedCorpus", "name": "Catalogue"}},
    "log": {"routing_stats_every": 5, "sinks": ["TensorBoard"]},
    "spikes": {"kind": "SkipSpikes", "patience": 3},
    "schedule": {"kind": "WSD", "shape": "LinearDecay"},
}


def test_keys_and_kinds_are_renamed_and_other_text_is_not() -> None:
    upgraded, renamed = upgrade_config(OLD)
    assert upgraded == NEW
    assert renamed == {
        "accumulate": "gradient_accumulation_steps",
        "corpus.kind=Catalogue": "NamedCorpus",
        "corpus": "data.corpus",
        "log.routes_every": "log.routing_stats_every",
        "log.also": "log.sinks",
        "spikes.lasting": "spikes.patience",
        "schedule.shape=Linear": "LinearDecay",
    }


def test_an_upgraded_config_has_nothing_to_rename() -> None:
    for name in RECIPES:
        config = RECIPES(name).to_dict()
        assert upgrade_config(config) == (config, {})


def test_attention_experts_become_the_mixer_called_attention() -> None:
    plain = {"model": {"dim": 8, "attention_experts": {"kind": "NoAttentionExperts"}}}
    assert upgrade_config(plain) == (
        {"model": {"dim": 8}},
        {"model.attention_experts": "model.mixers"},
    )
    mixture = {"kind": "MixtureOfAttention", "keys": "own"}
    upgraded, _ = upgrade_config({"model": {"attention_experts": mixture}})
    mixer = {"kind": "MixtureOfAttention", "key_values": "own"}
    assert upgraded == {"model": {"mixers": {"attention": mixer}}}


def test_offloading_is_a_memory_plan_with_host_tiers() -> None:
    def upgraded(offload: bool) -> dict[str, object]:
        parallel = {"plan": {"zero": 2, "offload": offload}}
        value, renamed = upgrade_config({"parallel": parallel})
        assert renamed == {"parallel.plan.offload": "parallel.memory"}
        assert isinstance(value, dict)
        return value["parallel"]

    host = MemoryPlan(gradients=HostMemory(), optimizer_states=HostMemory())
    assert ParallelConfig.from_dict(upgraded(True)).memory == host
    assert ParallelConfig.from_dict(upgraded(False)) == ParallelConfig(plan=ParallelPlan(zero=2))


def test_products_in_bfloat16_keep_their_meaning_where_the_name_has_another() -> None:
    earlier = {"precision": {"kind": "BFloat16"}, "parallel": {"plan": {"offload": False}}}
    upgraded, renamed = upgrade_config(earlier)
    assert renamed["precision=BFloat16"] == "BFloat16Autocast"
    assert upgraded == {"precision": {"kind": "BFloat16Autocast"}, "parallel": {"plan": {}}}
    assert upgrade_config({"precision": "BFloat16()"}) == ({"precision": "BFloat16()"}, {})


def test_what_is_upgraded_agrees_with_its_full_form() -> None:
    """A run's record is compared with its config, of which one may be in the full form."""
    earlier = RECIPES("tiny").to_dict()
    del earlier["parallel"]["memory"]
    earlier["parallel"]["plan"]["offload"] = True
    upgraded, _ = upgrade_config(earlier)
    full = dict(iter_leaves(Run.from_dict(upgraded).to_dict(), ""))
    assert {path: full.get(path) for path, _ in iter_leaves(upgraded, "")} == dict(
        iter_leaves(upgraded, "")
    )


def test_every_new_name_exists() -> None:
    configs = {c.__name__: c for c in _subclasses(Config) if c.__module__.startswith("moesaic.")}
    assert all(issubclass(configs[name], Choice) for name in RENAMED_KINDS.values())
    assert set(SECTIONS.values()) <= set(configs)
    assert issubclass(Slurm, Choice)  # its module is imported by the launch command alone
    for owner, moved in MOVED_KEYS.items():
        present = configs[owner].model_fields
        assert not set(moved) & set(present), owner
        assert {path[0] for path in moved.values()} <= set(present), owner
    for owner, keys in RENAMED_KEYS.items():
        fields = configs[owner].model_fields
        assert set(keys.values()) <= set(fields), owner
        assert not set(keys) & set(fields), owner


def test_an_old_config_is_refused_with_the_way_to_upgrade_it() -> None:
    text = RECIPES("tiny").to_yaml().replace("gradient_accumulation_steps", "accumulate")
    expected = "accumulate is now called gradient_accumulation_steps; .*moesaic config upgrade"
    with pytest.raises(ConfigError, match=re.compile(expected)):
        Run.from_yaml(text)


def _subclasses(cls: type) -> set[type]:
    return {cls} | {s for c in cls.__subclasses__() for s in _subclasses(c)}
