"""JSON Schema of a config, with which editors complete and check its YAML."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Families = Mapping[str, Mapping[str, type[BaseModel]]]
"""Full name of a family -> its members by name."""


def json_schema(cls: type[BaseModel], *, families: Families) -> dict[str, Any]:
    """Return the JSON Schema of ``cls``; docstrings are its descriptions.

    In pydantic's schema a choice is only ``{"family": full name}``. Here every family and every
    member becomes a definition: ``Norm``, ``Norm.RMSNorm``.
    """
    schema = cls.model_json_schema()
    defs: dict[str, Any] = schema.pop("$defs", {})
    waiting = [schema, *defs.values()]
    while waiting:
        for node in _family_nodes(waiting.pop()):
            full = node.pop("family")
            title = full.rpartition(".")[2]
            node.pop("title", None)  # the values of a mapping have none
            node["$ref"] = f"#/$defs/{title}"
            if title not in defs:
                added = _definitions(title, families[full])
                clash = [name for name in added if defs.get(name, added[name]) != added[name]]
                assert not clash, f"two classes of the names {clash} in one schema"
                defs |= added
                waiting += added.values()
    return {"$schema": DIALECT, **schema, "$defs": dict(sorted(defs.items()))}


def describe_fields(schema: dict[str, Any], *, of: type[BaseModel]) -> None:
    """Add the literals below the fields of a record to its schema, as their descriptions.

    They are read from the source here, not by pydantic when a class is defined: that takes a
    quarter of the time of all imports.
    """
    for base in reversed(of.__mro__):
        docs = _field_docs(base) if issubclass(base, BaseModel) else {}
        for name, doc in docs.items():
            if name in schema.get("properties", {}):
                schema["properties"][name]["description"] = doc


@cache
def _field_docs(cls: type) -> dict[str, str]:
    """Return field -> literal below it; none of a class whose source is not in a file."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, SyntaxError, TypeError):
        return {}
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _definitions(family: str, members: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Return the definitions of a family, of its members, and of their records."""
    found: dict[str, Any] = {}
    for name, member in members.items():
        shape = member.model_json_schema()
        found |= shape.pop("$defs", {})
        shape["required"] = ["kind", *shape.get("required", [])]
        found[f"{family}.{name}"] = shape
    refs = [{"$ref": f"#/$defs/{family}.{name}"} for name in members]
    word = {"type": "string", "pattern": rf"^\s*({'|'.join(members)})\s*(\(.*\))?\s*$"}
    return found | {family: {"title": family, "anyOf": [*refs, word]}}


def _family_nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the nodes of choices, except inside defaults and constants."""
    if isinstance(node, dict):
        if isinstance(node.get("family"), str):
            yield node
        for name, inner in node.items():
            if name not in ("default", "const", "enum"):
                yield from _family_nodes(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _family_nodes(inner)
