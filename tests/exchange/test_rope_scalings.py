"""Each scaling of rotary positions is read as transformers computes it, or refused by name."""

import pytest
import torch
from test_parity_with_transformers import batch_of, imported
from transformers_models import LLAMA3, MODELS, YARN

from moesaic.core.errors import ConfigError
from moesaic.exchange.families import FAMILIES
from moesaic.exchange.import_model import import_model

FACTORS = [1.0, 1.5, 2.0, 3.0]  # one for each pair of the eight channels of a head
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
    "llama3": LLAMA3,
    "yarn": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "original_max_position_embeddings": 8},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": FACTORS,
        "original_max_position_embeddings": 8,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_rotation_is_that_of_transformers(name, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    changes = {"rope_parameters": SCALINGS[name], "num_hidden_layers": 1}
    theirs = MODELS["llama"].build(max_position_embeddings=8, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", out=tmp_path / "ours")
    ours, rows = imported(tmp_path / "ours"), torch.randint(0, 96, (2, 12))
    wanted = theirs(input_ids=rows).logits
    got = ours.predict(ours(batch_of(rows)).hidden).view_as(wanted)
    assert (got - wanted).abs().max() <= 1e-5


def test_a_rotation_of_some_channels_is_refused_in_a_family_without_it():
    found = {"partial_rotary_factor": 0.5, "hidden_size": 8, "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"partial_rotary_factor: found 0.5, of which"):
        FAMILIES["llama"].mapping.read(found)
