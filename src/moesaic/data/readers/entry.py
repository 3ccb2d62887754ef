"""Entry: one message of a catalogue and its translation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """``default`` is the English of a catalogue whose messages are keys (``#. Default: ...``)."""

    source: str
    target: str
    default: str = ""
