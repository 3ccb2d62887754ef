"""A validator for the part of JSON Schema that our schemas use."""

import re
from typing import Any

TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """A JSON Schema validator for the words that our schemas use."""
    return _fits(value, schema, schema)


def _fits(value: Any, shape: dict[str, Any], schema: dict[str, Any]) -> bool:
    if "$ref" in shape:
        return _fits(value, schema["$defs"][shape["$ref"].removeprefix("#/$defs/")], schema)
    if "anyOf" in shape:
        return any(_fits(value, s, schema) for s in shape["anyOf"])
    if "const" in shape or "enum" in shape:
        return value in shape.get("enum", [shape.get("const")])
    if not isinstance(value, TYPES[shape["type"]]):
        return False
    if isinstance(value, str):
        return re.search(shape.get("pattern", ""), value) is not None
    if isinstance(value, list):
        places = shape.get("prefixItems") or [shape["items"]] * len(value)
        return len(places) == len(value) and all(
            _fits(v, place, schema) for v, place in zip(value, places, strict=True)
        )
    if isinstance(value, dict):
        known, others = shape.get("properties", {}), shape.get("additionalProperties", {})
        inner = [(v, known.get(name, others)) for name, v in value.items()]
        named = set(shape.get("required", [])) <= value.keys()
        return named and all(s is not False and _fits(v, s, schema) for v, s in inner)
    above, below = shape.get("exclusiveMinimum", -1e99), shape.get("exclusiveMaximum", 1e99)
    least, most = shape.get("minimum", -1e99), shape.get("maximum", 1e99)
    return value is None or (above < value < below and least <= value <= most)
