from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.core.errors import CheckpointError
from moesaic.recipes.lookup import find_recipe
from moesaic.serve.open_run import open_run


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("model.vocab_size=1000000", "do not fit"),
        ("model.encoder.layers=4000", "describes a far larger model"),
        ("model.dim=4096", "do not fit"),
    ],
)
def test_a_config_far_larger_than_its_weights_is_refused_before_memory_is_taken(
    tmp_path: Path, change: str, found: str
) -> None:
    run = RunDir(tmp_path)
    run.config.write_text(find_recipe("tiny", changes=[change]).to_yaml())
    run.tokenizer.write_text("{}")
    write_tensors(run.model, tensors={f"w{i}": torch.zeros(8) for i in range(99)})
    with pytest.raises(CheckpointError, match=found):
        open_run(run.path)
