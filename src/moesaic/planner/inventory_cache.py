"""Inventory cache: the parameters of a model, made once for equal configs."""

from dataclasses import dataclass, field
from functools import lru_cache

from moesaic.model.config import ModelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters


def inventory_of(
    config: ModelConfig, *, trainable: TrainableParameters | None = None
) -> ParameterInventory:
    """Return the parameters of a model and of adapters in it; equal configs have one inventory."""
    trainable = trainable or AllParameters()
    return _inventory_once(_KeyedModel(repr((config, trainable)), config, trainable))


@dataclass(frozen=True, slots=True)
class _KeyedModel:
    text: str
    config: ModelConfig = field(compare=False)
    trainable: TrainableParameters = field(compare=False)


@lru_cache(maxsize=64)
def _inventory_once(keyed: _KeyedModel) -> ParameterInventory:
    return ParameterInventory(keyed.config, trainable=keyed.trainable)
