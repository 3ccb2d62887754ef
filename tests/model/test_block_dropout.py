"""Dropout masks differ by token, layer and epoch, and are the same in every pass."""

from dataclasses import replace
from itertools import combinations

import torch

from moesaic.model.block import Dropout
from moesaic.model.transformer import Transformer
from moesaic.moe.router_context import TokenContext
from moesaic.testing.tiny_models import tiny_model_config

ONES = torch.ones(6, 64)


def _kept(*, name: str = "a", context: TokenContext | None = None) -> torch.Tensor:
    return Dropout(0.5, name=name)(ONES, context=context or TokenContext.unbatched(6))


def test_tokens_layers_and_epochs_drop_different_channels() -> None:
    here = TokenContext.unbatched(6)
    others = [
        _kept(name="b"),
        _kept(context=here.for_layer("decoder")),
        _kept(context=replace(here, row_key=here.row_key + 1)),
        _kept(context=replace(here, position=here.position + 6)),
    ]
    for one, other in combinations([*_kept(), *(row for kept in others for row in kept)], 2):
        assert not torch.equal(one, other)
    assert torch.equal(_kept(), _kept())


def test_nothing_is_dropped_outside_training_or_at_rate_zero() -> None:
    assert Dropout(0.5, name="a").eval()(ONES, context=TokenContext.unbatched(6)) is ONES
    assert Dropout(0.0, name="a")(ONES, context=TokenContext.unbatched(6)) is ONES


def test_dropout_names_are_unique_in_a_model() -> None:
    model = Transformer(tiny_model_config(layers=3).replace(dropout=0.1))
    names = [module.name for module in model.modules() if isinstance(module, Dropout)]
    assert len(names) == len(set(names)) == 1 + 3 * 2 + 3 * 3
