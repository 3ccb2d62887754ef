"""Pieces: the parameters of a part as arithmetic, so that a model is counted without being made."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter: its kind (``matrix``, ``expert``, ``router``, ``bias``) and shape.

    ``used`` is the share of it that one token multiplies with, and ``times`` how often it does.
    """

    kind: str
    shape: tuple[int, ...]
    active_fraction: float = 1.0
    uses_per_token: float = 1.0
