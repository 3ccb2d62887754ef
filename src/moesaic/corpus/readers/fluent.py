"""Project Fluent files (``.ftl``): messages, their attributes and terms, read with fluent.syntax.

A placeable becomes a placeholder in the form that the cleaning rules recognise: ``{ $count }`` and
``{ NUMBER($count) }`` are ``{$count}``, ``{ -brand(case: "genitive") }`` is ``{-brand}``. A literal
becomes its text. Of a selector only the default variant is read; the keys of the variants taken are
the message's ``invariants``. Junk is skipped, as Fluent's own parser does.
"""

import re
from collections.abc import Iterator
from contextlib import suppress

from fluent.syntax import FluentParser, ast

from moesaic.corpus.readers.keyed_text import KeyedText

_MESSAGE_START = re.compile(r"^(?=-?[A-Za-z][\w-]*[ ]*=)", re.MULTILINE)


def parse_fluent(text: str) -> Iterator[KeyedText]:
    """Yield the texts of a file, under ``message``, ``message.attribute`` or ``-term``.

    Never raises: a message that cannot be parsed is left out. Line breaks inside a text are kept.
    """
    for entry in _entries(text):
        if not isinstance(entry, ast.Message | ast.Term):
            continue
        name = f"-{entry.id.name}" if isinstance(entry, ast.Term) else entry.id.name
        attributes = [(f"{name}.{a.id.name}", a.value) for a in entry.attributes]
        for key, pattern in [(name, entry.value), *attributes]:
            variants: list[str] = []
            rendered = _render(pattern, variants=variants) if pattern else ""
            if rendered.strip():
                yield KeyedText(key, rendered, tuple(variants))


def _entries(text: str) -> Iterator[ast.EntryType]:
    """Parse a file, message by message where one is nested too deeply for the parser."""
    try:
        yield from FluentParser(with_spans=False).parse(text).body
    except RecursionError:
        for message in _MESSAGE_START.split(text):
            with suppress(RecursionError):
                yield from FluentParser(with_spans=False).parse(message).body


def _render(pattern: ast.Pattern, *, variants: list[str]) -> str:
    """Return a pattern as text; the keys of the variants taken are appended to ``variants``."""
    return "".join(
        element.value
        if isinstance(element, ast.TextElement)
        else _render_expression(element.expression, variants=variants)
        for element in pattern.elements
    )


def _render_expression(
    expression: ast.InlineExpression | ast.Placeable | ast.SelectExpression, *, variants: list[str]
) -> str:
    match expression:
        case ast.Placeable():
            return _render_expression(expression.expression, variants=variants)
        case ast.StringLiteral():
            return expression.parse()["value"]
        case ast.NumberLiteral():
            return expression.value
        case ast.SelectExpression():
            default = next(variant for variant in expression.variants if variant.default)
            key = default.key
            variants.append(key.name if isinstance(key, ast.Identifier) else key.value)
            return _render(default.value, variants=variants)
        case ast.FunctionReference():
            arguments = expression.arguments.positional
            variables = [a for a in arguments if isinstance(a, ast.VariableReference)]
            return f"{{${variables[0].id.name}}}" if variables else f"{{{expression.id.name}}}"
        case ast.VariableReference():
            return f"{{${expression.id.name}}}"
    sign = "-" if isinstance(expression, ast.TermReference) else ""
    attribute = f".{expression.attribute.name}" if expression.attribute else ""
    return f"{{{sign}{expression.id.name}{attribute}}}"
