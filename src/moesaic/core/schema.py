"""JSON Schema of a config, with which editors complete and check its YAML."""

from collections.abc import Iterator, Mapping
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
