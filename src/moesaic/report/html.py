"""HTML elements as values. All text is escaped, so no text can become markup or script."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

_VOID_ELEMENTS = frozenset(
    ("br", "hr", "img", "input", "meta", "link", "line", "rect", "circle", "path")
)


@dataclass(frozen=True, slots=True)
class Html:
    """A piece of valid markup."""

    text: str

    def __str__(self) -> str:
        return self.text


HtmlChild = Html | str | float | int | None


def tag(name: str, /, *children: HtmlChild, **attributes: str | float | int | None) -> Html:
    """Return an element. Strings are escaped; None children and attributes are left out.

    Attribute names are written with ``_`` for ``-``; a trailing ``_`` is dropped (``class_``).
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_format_number(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join_html(children).text
    if name in _VOID_ELEMENTS and not inside:
        return Html(f"<{name}{shown}/>")
    return Html(f"<{name}{shown}>{inside}</{name}>")


def join_html(children: Iterable[HtmlChild]) -> Html:
    """Concatenate pieces, escaping those that are text."""
    return Html(
        "".join(
            child.text
            if isinstance(child, Html)
            else html.escape(_format_number(child), quote=False)
            for child in children
            if child is not None
        )
    )


def html_table(
    head: Iterable[HtmlChild], *, rows: Iterable[Iterable[HtmlChild]], caption: str
) -> Html:
    """Return a table; the first cell of a row is its header."""
    body = []
    for row in rows:
        first, *rest = row
        body.append(tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag("tbody", *body),
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _format_number(value: str | float | int) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") if value == value else ""
    return _LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value))
