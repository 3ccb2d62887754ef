"""Which texts of a unit are in a language asked for: an exact tag before a reduced one.

A unit may have ``de-AT`` and ``de-DE``, which have the same code. Asked for ``de-DE`` it is that
text; asked for ``de`` it is ``de``, else the standard's (``de-DE``), else the first. Languages
nobody asked for, and tags that are none (``x-notes``, ``score``), are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from moesaic.corpus.languages import (
    find_language,
    is_same_tag,
    precise_tag,
    resolve_language,
    resolve_locale,
)

Found = TypeVar("Found")

_EXACT, _PLAIN, _STANDARD, _REDUCED = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class WantedLanguage:
    """A language as the user spelled it, and its code."""

    spelled: str
    code: str

    @classmethod
    def resolve(cls, spelled: str) -> "WantedLanguage":
        """Return the language of a spelling. Raises DataError when it is unknown."""
        return cls(spelled, resolve_language(spelled).code)

    def select(self, variants: Iterable[tuple[str, Found]]) -> list[Found]:
        """Return what stands under the tag that fits best, in order; nothing if none fits."""
        ranked: list[list[Found]] = [[], [], [], []]
        tags = ["", "", "", ""]
        for tag, found in variants:
            rank = self._rank(tag)
            if rank is not None and tags[rank] in ("", tag):
                tags[rank] = tag
                ranked[rank].append(found)
        return next((found for found in ranked if found), [])

    def _rank(self, tag: str) -> int | None:
        found = find_language(tag)
        if found is None or found.code != self.code:
            return None
        if is_same_tag(tag, self.spelled):
            return _EXACT
        if precise_tag(tag) == self.code:
            return _PLAIN
        return _STANDARD if resolve_locale(tag) is not None else _REDUCED
