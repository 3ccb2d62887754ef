"""Copy units: each placeholder of a text is one token, a numbered slot, that the model copies.

A model of a few million parameters cannot spell ``%(verbose_name)s`` if it has rarely read it. With
copy units a source, and the target that it learns from, hold slots instead of placeholders; the
text of a slot is put back after decoding. Slots are characters of private use, so that a text with
slots is text: the tokenizer has two pieces per slot, with and without the space before it.

The number of a slot is the rank of its placeholder's key among the distinct keys of the text. So
both sides of a pair, which have the same keys, number them alike, and a text on its own (denoising)
has slots too.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from moesaic.corpus.placeholders import Placeholder, find_placeholders

FIRST_SLOT = 0x10F000  # plane 16, private use
MAX_SLOTS = 64
_IS_SLOT = re.compile(f"[{chr(FIRST_SLOT)}-{chr(FIRST_SLOT + MAX_SLOTS - 1)}]")
# tags, BBCode, templates: {% if x %} ... {% endif %}, {{#x}} ... {{/x}}
_OPENING = re.compile(r"(?:<|\[|\{%-?\s*|\{\{#)([\w:.-]+)")
_CLOSING = re.compile(r"(?:</|\[/|\{%-?\s*end|\{\{/)([\w:.-]+)")


@dataclass(frozen=True, slots=True)
class CopyUnit:
    """The text of one slot, and how often it is in its text.

    At any place it has been written at most as often as the slots of ``after`` together, if there
    are any: ``</b>`` comes after a ``<b>``, and the arguments of ``%s %d`` are taken in order.
    """

    text: str
    count: int
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SlottedText:
    """A text with slots, and the unit of each slot. ``restore(self.text)`` is the original."""

    text: str
    units: tuple[CopyUnit, ...] = ()

    def restore(self, text: str) -> str:
        """Return ``text`` with the units in place of their slots.

        A unit gets spaces around it where the text beside it would change it (a URL before a
        letter); that is never so in the text that the units are from.
        """
        if not self.units:
            return text
        pieces = re.split(f"([{chr(FIRST_SLOT)}-{chr(FIRST_SLOT + len(self.units) - 1)}])", text)
        pieces[1::2] = [self.units[ord(slot) - FIRST_SLOT].text for slot in pieces[1::2]]
        joined = "".join(pieces)
        exact = {(found.start, found.end) for found in find_placeholders(joined)}
        ends = list(accumulate(map(len, pieces)))
        for i in range(1, len(pieces), 2):
            if (ends[i - 1], ends[i]) not in exact and not _IS_SLOT.fullmatch(pieces[i]):
                before, after = pieces[i - 1], pieces[i + 1]
                starts, last = i == 1 and not before, i + 2 == len(pieces) and not after
                pieces[i - 1] = before + " " * (not starts and not before[-1:].isspace())
                pieces[i + 1] = " " * (not last and not after[:1].isspace()) + after
        return "".join(pieces)

    def restrict(self, part: str) -> "SlottedText":
        """Return ``part`` of the text, with the units that it has the slots of.

        The numbers stay, so a unit whose slot is elsewhere has the count 0.
        """
        counts = [part.count(chr(FIRST_SLOT + i)) for i in range(len(self.units))]
        units = (replace(u, count=c) for u, c in zip(self.units, counts, strict=True))
        return SlottedText(part, tuple(units))


def slot_characters(count: int) -> tuple[str, ...]:
    """Return the characters of ``count`` slots."""
    return tuple(chr(FIRST_SLOT + i) for i in range(count))


def insert_slots(text: str, *, slots: int) -> SlottedText:
    """Replace the placeholders of ``text`` with at most ``slots`` distinct keys.

    Other placeholders stay text, and so does a second form of a key (``%1$s`` beside ``%s``). A
    slot character of the text itself is a unit too; where one cannot be, the text has no slots.
    """
    found = _with_slot_characters(text, find_placeholders(text)) if slots else []
    keys = sorted({p.key for p in found}, key=lambda key: (not _IS_SLOT.search(key), key))[:slots]
    numbers = {key: number for number, key in enumerate(keys)}
    forms = {p.key: p.text for p in reversed(found) if p.key in numbers}
    chosen = [p for p in found if forms.get(p.key) == p.text]
    parts, position = [], 0
    for placeholder in chosen:
        parts += [text[position : placeholder.start], chr(FIRST_SLOT + numbers[placeholder.key])]
        position = placeholder.end
    slotted = "".join([*parts, text[position:]])
    if not chosen or len(_IS_SLOT.findall(slotted)) > len(chosen):
        return SlottedText(text)
    return SlottedText(slotted, _units(chosen, numbers))


def _with_slot_characters(text: str, found: Sequence[Placeholder]) -> list[Placeholder]:
    inside = {i for p in found for i in range(p.start, p.end)}
    free = [m.start() for m in _IS_SLOT.finditer(text) if m.start() not in inside]
    more = [Placeholder(text[i], i, i + 1, "placeholder", text[i]) for i in free]
    return sorted([*found, *more], key=lambda p: p.start)


def _units(chosen: Sequence[Placeholder], numbers: dict[str, int]) -> tuple[CopyUnit, ...]:
    texts = {numbers[p.key]: p.text for p in chosen}
    counts = Counter(numbers[p.key] for p in chosen)
    directives = [p for p in chosen if p.kind == "printf" and p.key != p.text]
    after: dict[int, tuple[int, ...]] = {
        numbers[p.key]: (numbers[before.key],) for before, p in pairwise(directives)
    }
    opened: dict[str, list[int]] = defaultdict(list)
    for number, text in texts.items():
        if (opening := _OPENING.match(text)) and not text.endswith("/>"):
            opened[opening[1]].append(number)
    for number, text in texts.items():
        closing = _CLOSING.match(text)
        if closing and opened[closing[1]]:
            after[number] = tuple(opened[closing[1]])
    return tuple(CopyUnit(texts[i], counts[i], after.get(i, ())) for i in range(len(numbers)))
