"""Pair and Text: what every reader and builder yields, with where it came from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and its translation. Languages are codes; ``origin`` names package or file."""

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
    """A piece of text in one language."""

    text: str
    language: str
    origin: str = ""
    licence: str = ""
