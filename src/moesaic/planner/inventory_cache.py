"""Inventory cache: the parameters of a model, made once for equal configs."""

from dataclasses import dataclass, field
from functools import lru_cache

from moesaic.model.config import ModelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory


def inventory_of(config: ModelConfig) -> ParameterInventory:
    """Return the parameters of a model; equal configs have one inventory."""
    return _inventory_once(_KeyedModel(repr(config), config))


@dataclass(frozen=True, slots=True)
class _KeyedModel:
    text: str
    config: ModelConfig = field(compare=False)


@lru_cache(maxsize=64)
def _inventory_once(keyed: _KeyedModel) -> ParameterInventory:
    return ParameterInventory(keyed.config)
