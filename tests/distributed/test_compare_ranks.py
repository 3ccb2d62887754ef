"""Ranks that meet compare what must be the same on all of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import UserError
from moesaic.distributed import compare_ranks
from moesaic.distributed.compare_ranks import require_same_on_all_ranks, version_facts
from moesaic.distributed.forked_ranks import RankError, run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess
from moesaic.testing.tiny_models import synthetic_run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import no_progress


def _refusal(facts_of_rank: list[dict[str, Any]]) -> str:
    world = ProcessGroupWorld()
    try:
        require_same_on_all_ranks(facts_of_rank[world.rank], world=world, what="config")
    except UserError as error:
        return str(error)
    return ""


def test_equal_facts_pass_and_each_other_key_is_named_with_values_and_ranks() -> None:
    same = {"lr": 0.01, "model": {"dim": 64, "layers": [1, 2]}, "name": "\u00e9\U0001f600"}
    assert run_on_ranks(3, _refusal, [same] * 3) == [""] * 3
    other = {"lr": 0.001, "model": {"dim": 64, "layers": [1, 3], "bias": True}, "name": "e"}
    refusals = run_on_ranks(3, _refusal, [same, other, same])
    assert len(set(refusals)) == 1, "every rank says the same"
    assert "the ranks do not have the same config" in refusals[0]
    assert "lr is 0.01 on ranks 0, 2 and 0.001 on rank 1" in refusals[0]
    assert "model.layers is [1, 2] on ranks 0, 2 and [1, 3] on rank 1" in refusals[0]
    assert "model.bias is missing on ranks 0, 2 and true on rank 1" in refusals[0]
    assert "model.dim" not in refusals[0]


def test_a_process_by_itself_compares_nothing() -> None:
    require_same_on_all_ranks({"lr": object()}, world=SingleProcess(), what="config")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.dictionaries(st.text("ab", min_size=1, max_size=2), JSON, max_size=3), st.data())
def test_a_difference_is_named_whatever_the_facts_are(
    facts: dict[str, Any], data: st.DataObject
) -> None:
    changed = facts | {data.draw(st.text("ab", min_size=1, max_size=2)): data.draw(JSON)}
    same = json.dumps(facts, sort_keys=True) == json.dumps(changed, sort_keys=True)
    assert bool(list(compare_ranks._differences([facts, changed, facts]))) == (not same)


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 2},
    "optimizer.lr": {"optimizer.lr": 0.5},
    "clip_norm": {"clip_norm": 0.1},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "model.dim": {"model.dim": 32},
    "model.moe.experts": {"model.moe.experts": 8},
    "collective_timeout_s": {"collective_timeout_s": 7.0},
}


def _refused_run(folder: Path, home: Path, key: str) -> str:
    os.environ["MOESAIC_HOME"] = str(home)
    run = synthetic_run()
    if ProcessGroupWorld().rank == 1:
        run = run.override([f"{path}={value}" for path, value in CHANGES[key].items()])
    try:
        train(run, folder, progress=no_progress)
    except UserError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("key", CHANGES)
def test_a_run_with_another_config_on_one_rank_is_refused_before_anything_is_written(
    data_home: Path, tmp_path: Path, key: str
) -> None:
    refusals = run_on_ranks(2, _refused_run, tmp_path / "run", data_home, key)
    assert all(f"{key} is " in refusal for refusal in refusals), refusals
    assert not (tmp_path / "run").exists()


def _other_torch(folder: Path) -> None:
    if ProcessGroupWorld().rank == 1:
        compare_ranks.torch.__version__ = "1.0"  # pyright: ignore[reportAttributeAccessIssue]
    world = ProcessGroupWorld()
    require_same_on_all_ranks(version_facts(), world=world, what="software")


def test_another_version_of_torch_on_one_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"version of torch is .* on rank 0 and \"1.0\" on rank 1"):
        run_on_ranks(2, _other_torch, tmp_path)
