"""Preset: a model config with its source and the numbers that were published about it."""

from dataclasses import dataclass
from typing import Literal

from moesaic.core.registry import Registry
from moesaic.model.config import ModelConfig

Basis = Literal["paper", "code", "secondary", "guess"]


@dataclass(frozen=True, slots=True)
class Published:
    """A number that someone else published for the whole model.

    ``basis``: read in the ``paper`` itself, in released ``code``, or in a ``secondary`` text.
    """

    quantity: Literal["total", "active"]
    value: float
    basis: Basis
    source: str


@dataclass(frozen=True, slots=True)
class Preset:
    """``guessed`` names the fields of ``config`` that no source gives: they are our choice."""

    config: ModelConfig
    source: str
    published: tuple[Published, ...] = ()
    guessed: tuple[str, ...] = ()


PRESETS: Registry[Preset] = Registry("preset")


def preset(name: str) -> Preset:
    """Return a preset by name. Raises UserError naming the nearest one."""
    return PRESETS[name]()
