"""The text forms of a config: YAML, ``ArchiveMember(key=value)``, ``path=value``, flat lines."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import yaml

from moesaic.core.config_errors import show_value
from moesaic.core.errors import ConfigError
from moesaic.core.yaml_reader import MAX_YAML_DEPTH, read_yaml

MAX_CALL_LENGTH = 10_000  # characters of ``TopK(k=2)`` and the like

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


def write_yaml(value: JsonValue) -> str:
    """Return ``value`` as YAML, in the order of its keys."""
    return _dump(value, sort_keys=False)


def parse_call(text: str) -> dict[str, Any] | None:
    """Read ``TopK``, ``TopK(k=2)`` or ``Muon(adamw=AdamW(lr=1e-3))``; else None."""
    if len(text) > MAX_CALL_LENGTH:
        return None
    try:
        value = _parse_call_value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deep
        return None
    if isinstance(value, str):
        return {"kind": value}
    return value if isinstance(value, dict) and "kind" in value else None


def quoted_call(text: str) -> str | None:
    """Return ``DiskStorage(folder=/scratch)`` with quotes around its texts, or None if none lacks.

    The result is read by ``parse_call``; ``text`` is not.
    """
    quoted = re.sub(r"(\w+=)([^\s'\"()\[\]{},=]+)", _quote, text)
    return quoted if quoted != text and parse_call(quoted) else None


def _quote(found: re.Match[str]) -> str:
    bare = found[2]
    return found[0] if parse_call(f"X(x={bare})") else f'{found[1]}"{bare}"'


def _parse_call_value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=kind), args=[]):
            return {"kind": kind} | {str(w.arg): _parse_call_value(w.value) for w in node.keywords}
        case ast.Name(id=word):
            return {"true": True, "false": False, "null": None}.get(word, word)
        case ast.List(elts=inner) | ast.Tuple(elts=inner):
            return [_parse_call_value(n) for n in inner]
        case ast.Dict(keys=keys, values=values) if all(keys):
            names = [_parse_call_value(key) for key in keys if key is not None]
            return dict(zip(map(str, names), map(_parse_call_value, values), strict=True))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
    raise ValueError("only names, numbers, texts and lists are values of a config")


def set_by_path(tree: dict[str, Any], change: str) -> None:
    """Apply one ``path=value`` to the dicts of a config. A wrong name is set as well.

    Validation of the config reports it, as in a file. Raises ConfigError if the path does not
    exist.
    """
    path, equals, text = change.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps) or len(steps) > MAX_YAML_DEPTH:
        raise ConfigError([f"--set {show_value(change)}: expected path=value"])
    try:
        value = read_yaml(text)
    except ConfigError as error:
        raise ConfigError([f"--set {show_value(change)}: the value is {error}"]) from error
    here: Any = tree
    for depth, step in enumerate(steps[:-1]):
        place = _resolve_step(here, step, path=".".join(steps[:depth]))
        if isinstance(here, dict) and here.get(place) is None:
            here[place] = {}  # below null: a record of defaults
        elif isinstance(here[place], str):
            here[place] = parse_call(here[place]) or here[place]
        here = here[place]
    last = _resolve_step(here, steps[-1], path=".".join(steps[:-1]))
    if last == "kind":
        here.clear()  # settings of the old member do not apply to the new one
    here[last] = value


def flat_lines(value: JsonValue) -> list[str]:
    """Return sorted ``a.b.c = value`` lines; a list of scalars stays on one line."""
    return sorted(f"{path} = {_scalar(leaf)}" for path, leaf in iter_leaves(value, ""))


def _resolve_step(here: Any, step: str, *, path: str) -> Any:
    """Return the key or index of ``step`` in ``here``, the value at ``path``."""
    if isinstance(here, list):
        if not re.fullmatch("[0-9]{1,9}", step) or int(step) >= len(here):
            known = f"the places 0 to {len(here) - 1}" if here else "no places"
            raise ConfigError([f"{path}.{step}: {path} has {known}"])
        return int(step)
    if not isinstance(here, dict):
        raise ConfigError([f"{path}.{step}: {path} is {show_value(here)}, not a record"])
    return step


def iter_leaves(value: JsonValue, path: str) -> Iterator[tuple[str, JsonValue]]:
    """Yield ``(path, value)`` of every scalar, and of every list of scalars, below ``path``."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from iter_leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for i, inner in enumerate(value):
            yield from iter_leaves(inner, f"{path}.{i}")
    else:
        yield path, value


def _scalar(value: JsonValue) -> str:
    return _dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _dump(value: JsonValue, **style: Any) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, **style)
    if yaml.safe_load(text) == value:
        return text
    # PyYAML writes rare line breaks (U+0085, U+2028) unescaped and reads them as spaces
    return yaml.safe_dump(value, **style)
