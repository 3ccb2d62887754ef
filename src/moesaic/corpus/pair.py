"""Pair, Text and RejectedPair: the rows that sources yield, with their origin and licence."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and its translation. ``origin`` names the package or file."""

    source: str
    target: str
    source_language: str
    target_language: str
    origin: str = ""
    licence: str = ""

    @property
    def direction(self) -> tuple[str, str]:
        return self.source_language, self.target_language

    def reversed(self) -> "Pair":
        """Return the same pair read from target to source."""
        return Pair(
            self.target,
            self.source,
            self.target_language,
            self.source_language,
            self.origin,
            self.licence,
        )


@dataclass(frozen=True, slots=True)
class Text:
    """A text in one language: a sentence, or a document, with its ``domain`` if it has one."""

    text: str
    language: str
    origin: str = ""
    licence: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True)
class RejectedPair:
    """A pair that its source rejects; it is counted as dropped under ``reason``."""

    source_language: str
    target_language: str
    reason: str

    @property
    def direction(self) -> tuple[str, str]:
        return self.source_language, self.target_language
