"""A config builds the model it describes."""

import torch

from model.samples import BASE
from moesaic.model.transformer import Transformer
from moesaic.moe.layer import MoELayer


def test_building_twice_from_one_seed_gives_one_model():
    first, second = (torch.manual_seed(3) and Transformer(BASE) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_experts_are_where_the_config_says():
    names = [m.name for m in Transformer(BASE).modules() if isinstance(m, MoELayer)]
    assert names == ["encoder.1", "decoder.0", "decoder.1"]
