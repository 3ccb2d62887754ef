"""Text for a terminal: styles come from templates, never from the values put into them."""

import re
from string import Formatter

from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FIRST_SLOT = 0xE000  # private use: a character that stands for a value while markup is parsed


def styled(template: str, **values: object) -> Text:
    """Return ``template`` in Rich markup, with ``{name}`` replaced by values as plain text.

    Formats work as in ``str.format``: ``styled("[bold]{run}[/]: step {step:,}", ...)``. Control
    characters of a value are shown as ``\\x1b``, so that no name moves the cursor.
    """
    markup, inserted = "", []
    for literal, name, form, _ in Formatter().parse(template):
        markup += literal
        if name is not None:
            markup += chr(_FIRST_SLOT + len(inserted))
            inserted.append(_plain(values[name], form or ""))
    text = Text.from_markup(markup, emoji=False)
    slots = {chr(_FIRST_SLOT + i): value for i, value in enumerate(inserted)}
    places = [i for i, character in enumerate(text.plain) if character in slots]
    parts = text.divide(sorted({*places, *(i + 1 for i in places)}))
    return Text.assemble(*(_fill(part, slots) for part in parts))


def cyan(value: object) -> Text:
    """Return a value in the colour of names in tables."""
    return styled("[cyan]{value}[/]", value=value)


def visible(text: str) -> str:
    """Return ``text`` with control characters, but for tab and line feed, as escapes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _plain(value: object, form: str) -> Text:
    if isinstance(value, Text) and not form:
        return value
    return Text(visible(format(value, form)))


def _fill(part: Text, slots: dict[str, Text]) -> Text:
    value = slots.get(part.plain)
    if value is None:
        return part
    filled = value.copy()
    for span in part.spans:
        filled.stylize_before(span.style)
    return filled
