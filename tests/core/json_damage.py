"""Damages of a JSON file, for tests of what reads it."""

import json
from typing import Any

from hypothesis import strategies as st

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 2**63, 10**400, "", "x" * 9, "../../x", "/etc/passwd", "\0", "a\tb",
    [], {}, [[]], {"": None}, [1, "2"], {"train": {"pairs": "1"}}, float("inf"),
]  # fmt: skip


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """A copy of ``value`` with one field changed, removed or renamed; or its bytes damaged."""
    copy = json.loads(json.dumps(value))
    how = draw(st.sampled_from(["change", "change", "change", "remove", "rename", "cut", "bytes"]))
    if how in ("change", "remove", "rename"):
        _damage(draw, copy, how)
        return json.dumps(copy).encode()
    data = json.dumps(copy).encode()
    at = draw(st.integers(0, len(data) - 1))
    odd = draw(st.sampled_from([b"\xff", b"\0", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b'"']))
    return data[:at] if how == "cut" else data[:at] + odd + data[at + 1 :]


def _damage(draw: st.DrawFn, copy: Any, how: str) -> None:
    node = copy
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
            node = inner
            continue
        break
    if how == "change":
        node[key] = draw(st.sampled_from(ODD_VALUES))
    elif how == "remove" or not isinstance(node, dict):
        del node[key]
    else:
        node[draw(st.sampled_from(["x", "../x", "/etc/passwd", "a/b"]))] = node.pop(key)
