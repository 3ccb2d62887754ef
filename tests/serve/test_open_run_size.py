from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.core.errors import CheckpointError
from moesaic.recipes.lookup import find_recipe
from moesaic.serve.open_run import open_run


@pytest.mark.parametrize(
    "change", ["model.vocab_size=1000000", "model.encoder.layers=4000", "model.dim=4096"]
)
def test_a_config_far_larger_than_its_weights_is_refused_before_memory_is_taken(
    tmp_path: Path, change: str
) -> None:
    run = RunDir(tmp_path)
    run.config.write_text(find_recipe("tiny", changes=[change]).to_yaml())
    run.tokenizer.write_text("{}")
    write_tensors(run.model, tensors={"w": torch.zeros(8)})
    with pytest.raises(CheckpointError, match="describes a far larger model"):
        open_run(run.path)
