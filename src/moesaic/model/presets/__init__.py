"""Presets: named model configs with their sources.

``preset("zcode-m3-64")`` returns the config, its source, published numbers and which fields are
guesses.
"""

from moesaic.model.presets import own_presets, published_presets
from moesaic.model.presets.preset import PRESETS, Preset, Published, preset

__all__ = ["PRESETS", "Preset", "Published", "preset"]
MODULES = (own_presets, published_presets)  # importing a module registers its presets
