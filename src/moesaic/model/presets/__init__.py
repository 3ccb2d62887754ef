"""Presets: named model configs with their sources.

``preset("zcode-m3-64")`` returns the config, its source, published numbers and which fields are
guesses.
"""

# importing a module registers its presets
from moesaic.model.presets import own_presets as own_presets
from moesaic.model.presets import published_presets as published_presets
from moesaic.model.presets.preset import PRESETS, Preset, Published, preset

__all__ = ["PRESETS", "Preset", "Published", "preset"]
