"""FTL: Project Fluent's files (its syntax 1.0): messages, their attributes, and terms.

A placeable becomes a placeholder in the form that the cleaning rules know: ``{ $count }`` and
``{ NUMBER($count) }`` are ``{$count}``, ``{ -brand(case: "genitive") }`` is ``{-brand}``. A literal
is its text. Of a selector the default variant is taken (the one with the star); the others are not
read, and the keys of those taken are the message's ``marks``. What is no Fluent syntax is passed
over, as Fluent's own parser does.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from textwrap import dedent

from moesaic.corpus.readers.keyed_text import KeyedText

_ENTRY = re.compile(r"(-?[A-Za-z][\w-]*) *=(.*)", re.DOTALL)
_ATTRIBUTE = re.compile(r"[ ]+\.([A-Za-z][\w-]*) *=(.*)", re.DOTALL)
_VARIANT = re.compile(r"^[ ]*(\*?)\[ *([\w.-]+) *\]", re.MULTILINE)
_VARIABLE = re.compile(r"\$[A-Za-z][\w-]*")
_REFERENCE = re.compile(r"-?[A-Za-z][\w-]*(?:\.[A-Za-z][\w-]*)?")
_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{6})|(.))")
_MAX_DEPTH = 20  # selectors inside selectors


class _JunkError(Exception):
    """A pattern that is no Fluent."""


@dataclass(slots=True)
class _OpenPattern:
    """The pattern being read, line by line; ``depth`` counts its open braces."""

    key: str
    first: str
    rest: list[str] = field(default_factory=list)
    depth: int = 0

    def text(self) -> str:
        """The pattern without the indent that its lines have in common."""
        return f"{self.first.strip()}\n{dedent(chr(10).join(self.rest))}".strip()


def parse_fluent(lines: Iterable[str]) -> Iterator[KeyedText]:
    """Yield the texts of a file, under ``message``, ``message.attribute`` or ``-term``.

    Never raises: a message that cannot be read is left out. Line breaks inside a text are kept.
    """
    for pattern in _patterns(lines):
        taken: list[str] = []
        try:
            text = _render(pattern.text(), taken=taken, depth=0)
        except _JunkError:
            continue
        if text.strip():
            yield KeyedText(pattern.key, text, tuple(taken))


def _patterns(lines: Iterable[str]) -> Iterator[_OpenPattern]:
    entry, pattern = "", None
    for raw in lines:
        line = raw.rstrip("\r\n")
        inside = pattern is not None and pattern.depth > 0
        starts = _starts(line, entry=entry, inside=inside)
        if starts is None and pattern is not None and _continues(line, inside=inside):
            pattern.rest.append(line)
            pattern.depth += _braces(line)
            continue
        if pattern is not None:
            yield pattern
        pattern = starts
        if starts is None:
            entry = ""  # a comment or junk ends the message
        elif "." not in starts.key:
            entry = starts.key
    if pattern is not None:
        yield pattern


def _starts(line: str, *, entry: str, inside: bool) -> _OpenPattern | None:
    """The pattern that this line begins; a new message begins even where braces are open."""
    match = _ENTRY.fullmatch(line)
    if match:
        return _OpenPattern(match[1], match[2], depth=_braces(match[2]))
    match = _ATTRIBUTE.fullmatch(line) if entry and not inside else None
    return _OpenPattern(f"{entry}.{match[1]}", match[2], depth=_braces(match[2])) if match else None


def _continues(line: str, *, inside: bool) -> bool:
    return not line.strip() or line.startswith(" ") or (inside and line[0] in "}[*")


def _braces(line: str) -> int:
    plain = _LITERAL.sub("", line) if "{" in line else line
    return plain.count("{") - plain.count("}")


def _render(text: str, *, taken: list[str], depth: int) -> str:
    """Replace every placeable of a pattern."""
    if depth > _MAX_DEPTH:
        raise _JunkError
    parts, at = [], 0
    while (start := text.find("{", at)) >= 0:
        end = _closing(text, start)
        parts += [
            text[at:start],
            _placeable(text[start + 1 : end].strip(), taken=taken, depth=depth),
        ]
        at = end + 1
    return "".join([*parts, text[at:]])


def _closing(text: str, start: int) -> int:
    """Index of the brace that closes the one at ``start``; braces in string literals are text."""
    depth, at = 0, start
    while at < len(text):
        literal = _LITERAL.match(text, at) if depth and text[at] == '"' else None
        if literal:
            at = literal.end()
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1
    raise _JunkError


def _placeable(inside: str, *, taken: list[str], depth: int) -> str:
    literal = _LITERAL.fullmatch(inside)
    if literal:
        return _ESCAPE.sub(_character, literal[1])
    if re.fullmatch(r"-?\d+(?:\.\d+)?", inside):
        return inside
    if inside.startswith("{"):
        return _render(inside, taken=taken, depth=depth + 1)
    selector, arrow, variants = inside.partition("->")
    if arrow and '"' not in selector.partition("(")[0]:
        return _default_variant(variants, taken=taken, depth=depth)
    variable, reference = _VARIABLE.search(inside), _REFERENCE.match(inside)
    if variable and not inside.startswith("-"):
        return f"{{{variable[0]}}}"
    if reference:
        return f"{{{reference[0]}}}"
    raise _JunkError


def _default_variant(variants: str, *, taken: list[str], depth: int) -> str:
    found = [m for m in _VARIANT.finditer(variants) if _braces(variants[: m.start()]) == 0]
    for number, match in enumerate(found):
        if match[1]:
            end = found[number + 1].start() if number + 1 < len(found) else len(variants)
            taken.append(match[2])
            return _render(variants[match.end() : end].strip(), taken=taken, depth=depth + 1)
    raise _JunkError


def _character(match: re.Match[str]) -> str:
    short, long, simple = match.groups()
    code = int(short or long, 16) if short or long else 0
    if simple:
        return simple
    return chr(code) if code < 0xD800 or 0xDFFF < code < 0x110000 else "\ufffd"
