"""Vocabulary: how many ids a tokenizer has, and which of them are no text.

Every part that needs the id of a role (the end of an answer, the mask of a noise, the tag of a
language) gets it from this record: no id means anything by its number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from moesaic.core.errors import DataError, did_you_mean, listed

ROLES = ("pad", "bos", "eos", "unk", "mask")
MAX_ROWS = 2**22  # of any vocabulary; the largest ones that are in use have a million


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids 0 to ``size - 1`` of a model's text by role; a role that there is not is None.

    Two roles may share an id (GPT-2 pads with its end). A text may end with ``other_ends`` than
    ``eos`` too. ``tags`` has the tag of a language or task by its code. ``not_text`` are further
    ids that are never generated: unused rows, markers. ``id_map`` has the id of each id of the
    tokenizer's file, None if they are the same.
    """

    size: int
    eos: int
    pad: int | None = None
    bos: int | None = None
    unk: int | None = None
    mask: int | None = None
    tags: Mapping[str, int] = field(default_factory=dict)
    other_ends: tuple[int, ...] = ()
    not_text: tuple[int, ...] = ()
    id_map: tuple[int, ...] | None = None

    @staticmethod
    def of_roles(
        size: int,
        roles: Mapping[str, int],
        *,
        tags: Mapping[str, int],
        id_map: tuple[int, ...] | None = None,
    ) -> "Vocabulary":
        """Return the record of roles by name, of which ``eos`` must be one. Raises DataError."""
        pad, bos, unk, mask = (roles.get(name) for name in ("pad", "bos", "unk", "mask"))
        return Vocabulary(
            size, roles["eos"], pad=pad, bos=bos, unk=unk, mask=mask, tags=tags, id_map=id_map
        )

    def __post_init__(self) -> None:
        for name, index in {**self.roles, **{f"tag {c}": i for c, i in self.tags.items()}}.items():
            if not 0 <= index < self.size:
                raise DataError(f"{name} is id {index}, expected one of 0 to {self.size - 1}")
        if self.id_map is not None:
            require_distinct_rows(self.id_map)
            if max(self.id_map, default=0) >= self.size:
                raise DataError(
                    f"the id map has row {max(self.id_map)}, expected 0 to {self.size - 1}"
                )

    @property
    def roles(self) -> dict[str, int]:
        """The roles that there are, with their ids."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in ROLES}
        return {name: index for name, index in found.items() if index is not None}

    @property
    def suppressed(self) -> tuple[int, ...]:
        """The ids that are never generated: all that are no text, but for the ends."""
        special = {*self.roles.values(), *self.tags.values(), *self.not_text}
        return tuple(sorted(special - {*self.ends}))

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text, ``eos`` first."""
        return (self.eos, *self.other_ends)

    def role(self, name: str, *, needed_by: str) -> int:
        """Return the id of a role. Raises DataError, which names what needs it."""
        found = self.roles.get(name)
        if found is None:
            raise DataError(
                f"the tokenizer has no {name} token, which {needed_by} needs: name one of its "
                f"tokens as data.tokenizer.{name}, or choose what does without"
            )
        return found

    def tag(self, code: str) -> int:
        """Return the tag of a language or task. Raises DataError naming the nearest one."""
        if code not in self.tags:
            raise DataError(
                f'this tokenizer has no language "{code}" (no tag for it); it has '
                f"{listed(self.tags) or 'none'}{did_you_mean(code, self.tags)}"
            )
        return self.tags[code]


def require_distinct_rows(rows: Sequence[int]) -> None:
    """Raise DataError unless each id of an id map has a row of its own, from 0 on."""
    id_of: dict[int, int] = {}
    for index, row in enumerate(rows):
        if row < 0:
            raise DataError(f"the id map has row {row} for id {index}, expected 0 or more")
        if (other := id_of.setdefault(row, index)) != index:
            raise DataError(
                f"the id map has row {row} for the ids {other} and {index}: what is decoded would "
                "not be known; give each id a row of its own"
            )
