"""YAML reader with limits: size, depth, number of values with aliases expanded, plain kinds only.

Differs from PyYAML's safe loader: a repeated key is an error; dates stay text; only ``true`` and
``false`` are booleans (``no`` is a language); no sexagesimal numbers; no tags beyond the plain
kinds; a scalar that its tag cannot hold is an error with its place, never an exception of Python.
"""

import re
from collections.abc import Hashable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from moesaic.core.errors import ConfigError, printable
from moesaic.core.file_reader import KIB, MAX_INT, FileKind, read_text

MAX_YAML_DEPTH = 50
MAX_YAML_VALUES = 50_000  # keys and values, each alias counted as what it stands for
CONFIG_FILE = FileKind(name="config in YAML", max_bytes=512 * KIB, error=ConfigError)

_TAG = "tag:yaml.org,2002:"
_KINDS = {f"{_TAG}{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_NODES = {f"{_TAG}map": yaml.MappingNode, f"{_TAG}seq": yaml.SequenceNode}
_MERGE = f"{_TAG}merge"


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises ConfigError, also for a repeated key."""
    if len(text) > CONFIG_FILE.max_bytes:
        found = f"{len(text):,} characters"
        raise ConfigError([f"not valid YAML: {found}, expected at most {CONFIG_FILE.max_bytes:,}"])
    try:
        return deepcopy(_parse(text))
    except yaml.YAMLError as error:
        found = printable(" ".join(str(error).split()), limit=400)
        raise ConfigError([f"not valid YAML: {found}"]) from error


@lru_cache(maxsize=4)  # a command reads the config of its run several times
def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def read_yaml_file(path: Path) -> Any:
    """Return the value of a YAML file. Raises ConfigError that names the file."""
    try:
        return read_yaml(read_text(path, CONFIG_FILE))
    except ConfigError as error:
        problems = (p if p.startswith(f"{path}") else f"{path}: {p}" for p in error.problems)
        raise ConfigError(problems) from error


class _Loader(yaml.SafeLoader):
    """YAML loader with the limits of this module."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._sizes: dict[yaml.Node, int] = {}  # values in a node, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; count what it contains."""
        before, event = self._values, self.peek_event()
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_YAML_DEPTH:
            self._fail(f"nested deeper than {MAX_YAML_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        size = self._sizes.get(node, 0) if is_alias and node is not None else 1
        if not size:
            self._fail("an alias refers to the value that contains it", event)
        self._values += size
        if self._values > MAX_YAML_VALUES:
            self._fail(f"more than {MAX_YAML_VALUES:,} values (aliases expanded)", event)
        if node is not None:
            self._sizes.setdefault(node, self._values - before)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Construct a value of the plain kinds."""
        if node.tag not in _KINDS:
            self._fail(f'the tag "{printable(node.tag)}" is not one of a config', node)
        if not isinstance(node, _NODES.get(node.tag, yaml.ScalarNode)):
            self._fail(f"{_show_node(node)} is no {node.tag.removeprefix(_TAG)}", node)
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.removeprefix(_TAG)
            self._fail(f"{_show_node(node)} is no {kind}", node, error)
        else:
            if isinstance(value, int) and abs(value) > MAX_INT:
                self._fail(f"{_show_node(node)} is beyond the whole numbers of 64 bits", node)
            return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """Construct a mapping; a repeated key, or one that is no scalar, is an error."""
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.tag if key.tag == _MERGE else self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                self._fail("a key is a list or a mapping, expected a name", key)
            if name in seen:
                self._fail(f'the key "{printable(str(key.value))}" is repeated', key)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)

    def _fail(self, problem: str, where: Any, cause: Exception | None = None) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, where.start_mark) from cause


def _show_node(node: yaml.Node) -> str:
    return (
        f'"{printable(node.value)}"' if isinstance(node, yaml.ScalarNode) else "a list or mapping"
    )


def _set_scalar_kinds() -> None:
    """Give the loader its own rules for plain scalars: fewer kinds than YAML 1.1."""
    drop = {f"{_TAG}{kind}" for kind in ("bool", "int", "float", "timestamp", "value")}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in drop]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    boolean = re.compile("^(?:true|True|TRUE|false|False|FALSE)$")
    whole = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0[0-7_]+|0b[01_]+)$")
    number = re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    )
    _Loader.add_implicit_resolver(f"{_TAG}bool", boolean, list("tTfF"))
    _Loader.add_implicit_resolver(f"{_TAG}int", whole, list("-+0123456789"))
    _Loader.add_implicit_resolver(f"{_TAG}float", number, list("-+0123456789."))


_set_scalar_kinds()
