"""Snapshot: everything a run needs to go on, as plain values and named tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after ``step`` updates.

    ``files`` maps a file name without ending (``model``, ``optimizer``, ``random``) to its named
    tensors. ``state`` is JSON-able: the config, the data position, counters.
    """

    step: int
    files: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
