"""Preset: a model config with its source, and what was published about it beside what we count."""

from dataclasses import dataclass
from typing import Literal

from moesaic.model.config import ModelConfig

Basis = Literal["paper", "code", "secondary", "guess"]


@dataclass(frozen=True, slots=True)
class Published:
    """A number someone else gave for the whole model.

    ``basis``: read in the ``paper`` itself, in released ``code``, or in a ``secondary`` text.
    """

    quantity: Literal["total", "active"]
    value: float
    basis: Basis
    source: str


@dataclass(frozen=True, slots=True)
class Preset:
    """``guessed`` names the fields of ``config`` that no source gives: they are ours."""

    config: ModelConfig
    source: str
    published: tuple[Published, ...] = ()
    guessed: tuple[str, ...] = ()
