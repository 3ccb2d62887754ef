"""The shelf that recipes stand on; ``@RECIPES.register()`` puts one there."""

from moesaic.core.registry import Registry
from moesaic.train.run import Run

RECIPES: Registry[Run] = Registry("recipe")
