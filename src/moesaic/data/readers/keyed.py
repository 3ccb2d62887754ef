"""Keyed: one text of a file that holds one language, under the key that its translations share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyedText:
    """``marks`` is what two sides under one key should have in common beside the text."""

    key: str
    text: str
    invariants: tuple[str, ...] = ()
