"""Presets: named model shapes, one file per family, each with its source.

``preset("zcode-m3-64")`` returns config, source, published numbers and which fields are guesses.
"""

from moesaic.core.registry import Registry
from moesaic.model.presets import (
    deepseek_moe,
    deepspeed_moe,
    large,
    nllb_moe,
    own_presets,
    zcode_m3,
)
from moesaic.model.presets.preset import Preset, Published

__all__ = ["PRESETS", "Preset", "Published", "preset"]

PRESETS: Registry[Preset] = Registry("preset")
for _family in (
    own_presets.FAMILY,
    zcode_m3.FAMILY,
    nllb_moe.FAMILY,
    deepspeed_moe.FAMILY,
    deepseek_moe.FAMILY,
    large.FAMILY,
):
    for _name, _make in _family.items():
        PRESETS.register(_name)(_make)


def preset(name: str) -> Preset:
    """Return a preset by name. Raises UserError naming the nearest one."""
    return PRESETS[name]()
