"""Plural formulas of gettext catalogues: ``nplurals=3; plural=n==1 ? 0 : n%10>=2 ? 1 : 2;``.

The formula is a C expression in ``n``. A parser of its own evaluates it, in unsigned 64-bit
arithmetic like gettext's, with limits on its length and depth: nothing of a file is ever executed.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from moesaic.corpus.readers import limits

_FIELD = re.compile(r"nplurals\s*=\s*(\d{1,3})\s*;\s*plural\s*=\s*([^;]+)")
_TOKEN = re.compile(r"\s*(\d{1,18}(?!\d)|n(?!\w)|\|\||&&|[=!<>]=|[-+*/%!<>?:()])")
_WRAP = (1 << 64) - 1
_COUNTED = range(2, 201)  # the numbers among which a plural form is the most frequent
_LEVELS = (("||",), ("&&",), ("==", "!="), ("<", ">", "<=", ">="), ("+", "-"), ("*", "/", "%"))

Value = Callable[[int], int]


class FormulaError(ValueError):
    """A plural formula that cannot be read, or divides by zero."""


@dataclass(frozen=True, slots=True)
class PluralForms:
    """Which form of a translation is for one thing, and which for most numbers of things.

    ``plural`` equals ``singular`` in languages with a single form.
    """

    singular: int
    plural: int


@lru_cache(maxsize=256)
def parse_plural_forms(field: str) -> PluralForms:
    """Return the forms of a ``Plural-Forms`` field. Raises FormulaError."""
    match = _FIELD.match(field.strip()[: limits.MAX_FORMULA_CHARS + 50])
    if match is None:
        raise FormulaError("expected nplurals=NUMBER; plural=EXPRESSION;")
    formula, count = _parse(match[2]), int(match[1])
    try:
        singular, common = formula(1), Counter(formula(n) for n in _COUNTED)
    except RecursionError as error:
        raise FormulaError("has too many operators") from error
    if max(singular, *common) >= max(count, 1):
        raise FormulaError(f"gives form {max(singular, *common)}, but nplurals is {count}")
    others = [(-seen, form) for form, seen in common.items() if form != singular]
    return PluralForms(singular, min(others)[1] if others else singular)


def forms_without_formula(count: int) -> PluralForms | None:
    """Return the forms where a header has no formula; None where nothing tells them apart.

    Wherever there are two forms, the first is for one thing (gettext's own default).
    """
    return PluralForms(0, count - 1) if count in (1, 2) else None


def _parse(expression: str) -> Value:
    if len(expression) > limits.MAX_FORMULA_CHARS:
        raise FormulaError(f"longer than {limits.MAX_FORMULA_CHARS} characters, the limit")
    tokens, at, text = [], 0, expression.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise FormulaError(f"cannot read {text[at : at + 20].strip()!r}")
        tokens.append(match[1])
        at = match.end()
    parser = _Parser(tokens)
    formula = parser.ternary(0)
    if parser.peek():
        raise FormulaError(f"found {parser.peek()!r} after the expression")
    return formula


class _Parser:
    """A recursive-descent parser of C's conditional, logical, relational and arithmetic operators.

    Each method returns a function of ``n``.
    """

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    def peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def ternary(self, depth: int) -> Value:
        if depth > limits.MAX_FORMULA_DEPTH:
            raise FormulaError(f"nested deeper than {limits.MAX_FORMULA_DEPTH}, the limit")
        condition = self._binary(0, depth)
        if self.peek() != "?":
            return condition
        self._take("?")
        then = self.ternary(depth + 1)
        self._take(":")
        otherwise = self.ternary(depth + 1)
        return lambda n: then(n) if condition(n) else otherwise(n)

    def _binary(self, level: int, depth: int) -> Value:
        if level == len(_LEVELS):
            return self._unary(depth)
        left = self._binary(level + 1, depth)
        chain = 0
        while self.peek() in _LEVELS[level]:
            chain += 1
            if chain > limits.MAX_FORMULA_DEPTH:
                raise FormulaError(f"more than {limits.MAX_FORMULA_DEPTH} operators in a row")
            operator = self._take(self.peek())
            left = _combined(operator, left, self._binary(level + 1, depth))
        return left

    def _unary(self, depth: int) -> Value:
        negated = 0
        while self.peek() == "!":
            self._take("!")
            negated += 1
        value = self._primary(depth)
        if not negated:
            return value
        return lambda n: int(bool(value(n)) == (negated % 2 == 0))

    def _primary(self, depth: int) -> Value:
        token = self.peek()
        if token == "(":
            self._take("(")
            inner = self.ternary(depth + 1)
            self._take(")")
            return inner
        if token != "n" and not token.isdigit():
            raise FormulaError(f"found {token or 'its end'!r}, expected n, a number or (")
        self._take(token)
        number = int(token) if token != "n" else 0
        return (lambda n: n) if token == "n" else (lambda _: number)

    def _take(self, expected: str) -> str:
        if self.peek() != expected:
            raise FormulaError(f"found {self.peek() or 'its end'!r}, expected {expected!r}")
        self._at += 1
        return expected


def _combined(operator: str, left: Value, right: Value) -> Value:
    match operator:
        case "||":
            return lambda n: int(bool(left(n)) or bool(right(n)))
        case "&&":
            return lambda n: int(bool(left(n)) and bool(right(n)))
        case "/" | "%":
            return lambda n: _divided(operator, left(n), right(n))
    compute: dict[str, Callable[[int, int], int]] = {
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
        "<=": lambda a, b: a <= b,
        ">=": lambda a, b: a >= b,
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    function = compute[operator]
    return lambda n: int(function(left(n), right(n))) & _WRAP


def _divided(operator: str, value: int, by: int) -> int:
    if by == 0:
        raise FormulaError("divides by zero")
    return value // by if operator == "/" else value % by
