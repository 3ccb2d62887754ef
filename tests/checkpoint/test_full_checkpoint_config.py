from pathlib import Path

import pytest

from moesaic.checkpoint.full_checkpoint import config_differences, require_same_config
from moesaic.core.errors import CheckpointError

SAVED = {"steps": 10, "model": {"dim": 8, "experts": [{"k": 1}, {"k": 2}]}, "log": {"every": 5}}


def test_every_differing_key_is_named_with_both_values():
    now = {"steps": 20, "model": {"dim": 16, "experts": [{"k": 1}, {"k": 3}], "bias": True}}
    with pytest.raises(CheckpointError) as caught:
        require_same_config(SAVED, current=now, where=Path("runs/a"), ignored=["steps", "log"])
    text = str(caught.value)
    assert "model.dim: 8 in the checkpoint, 16 now" in text
    assert "model.experts.1.k: 2 in the checkpoint, 3 now" in text
    assert "model.bias: - in the checkpoint, True now" in text
    assert "steps" not in text
    assert "log" not in text


def test_equal_configs_and_free_keys_pass():
    require_same_config(SAVED, current=SAVED, where=Path("a"))
    require_same_config(SAVED, current=SAVED | {"steps": 99}, where=Path("a"), ignored=["steps"])


def test_a_free_key_frees_no_other_that_starts_alike():
    assert config_differences({"step": 1}, {"step": 2}) == {"step": ("1", "2")}
    with pytest.raises(CheckpointError, match="steps_more"):
        require_same_config({"steps_more": 1}, current={}, where=Path("a"), ignored=["steps"])
