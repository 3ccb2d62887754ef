"""Damages of the files of the package, for tests of what reads them."""

import json
import struct
from copy import deepcopy
from typing import Any

import yaml
from hypothesis import strategies as st


def nested(depth: int) -> Any:
    """A list in a list, ``depth`` levels."""
    value: Any = 7
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 7, 2**31, 2**63, -(2**63), 10**18, 10**400, "", "x" * 9, "../../x",
    "/etc/passwd", "\0", "a\tb", "\ud83d", "NaN", "-Infinity", "<script>", [], {}, [[]],
    {"": None}, [1, "2"], {"train": {"pairs": "1"}}, float("inf"), float("nan"), 1e308, -0.0,
    nested(60), nested(300), {"kind": "X"}, [0] * 40, ["a"] * 40,
]  # fmt: skip
ODD_BYTES = [
    b"", b"\xff", b"\0", b"\n", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b'"', b"\\ud83d",
    b"\xed\xa0\x80", b"../", b"\xff" * 8, b"\0" * 8, b",", b"&a [*a, *a]", b"\xef\xbb\xbf",
]  # fmt: skip


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """A copy of ``value`` with a field changed, removed, renamed or repeated, or bytes damaged."""
    copy = json.loads(json.dumps(value))
    how = draw(st.sampled_from(["change"] * 4 + ["remove", "rename", "repeat", "bytes"]))
    if how in ("change", "remove", "rename"):
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            _damage(draw, copy, how)
        return json.dumps(copy).encode()
    data = json.dumps(copy).encode()
    return _with_repeated_key(draw, data) if how == "repeat" else draw(damaged_bytes(data))


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a file with pieces flipped, cut out, inserted, or without its end."""
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "replace", "end"]))
        odd = draw(st.one_of(st.sampled_from(ODD_BYTES), st.binary(min_size=1, max_size=8)))
        length = draw(st.sampled_from([1, 2, 8, 64]))
        match how:
            case "flip" if data:
                flipped = data[at] ^ (1 << draw(st.integers(0, 7)))
                data = data[:at] + bytes([flipped]) + data[at + 1 :]
            case "cut":
                data = data[:at] + data[at + length :]
            case "insert":
                data = data[:at] + odd + data[at:]
            case "end":
                data = data[:at]
            case _:
                data = data[:at] + odd + data[at + len(odd) :]
    return data


@st.composite
def damaged_file(draw: st.DrawFn, data: bytes, form: str) -> bytes:
    """The content of a file with a damage that keeps its form, or any damage of its bytes."""
    if form == "bytes" or not draw(st.integers(0, 4)):
        return draw(damaged_bytes(data))
    if form == "yaml":
        return draw(damaged_json(yaml.safe_load(data)))
    if form == "lines":
        lines = data.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = draw(damaged_json(json.loads(lines[at])))
        return b"\n".join(lines) + b"\n"
    if form == "safetensors":
        return draw(_damaged_header(data))
    return draw(damaged_json(json.loads(data)))


@st.composite
def _damaged_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with another header, also with other JSON in a text of its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    texts = [k for k, v in header.get("__metadata__", {}).items() if v.startswith("{")]
    if texts and draw(st.booleans()):
        inner = draw(damaged_json(json.loads(header["__metadata__"][texts[0]])))
        header["__metadata__"][texts[0]] = inner.decode("utf-8", "replace")
        head = json.dumps(header).encode()
    else:
        head = draw(damaged_json(header))
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def _with_repeated_key(draw: st.DrawFn, data: bytes) -> bytes:
    ends = [i for i in range(len(data)) if data[i : i + 1] == b"{"]
    at = draw(st.sampled_from(ends)) if ends else 0
    key = data[at + 1 :].partition(b":")[0]
    odd = json.dumps(draw(st.sampled_from(ODD_VALUES))).encode()
    return data[: at + 1] + key + b": " + odd + b", " + data[at + 1 :]


def _damage(draw: st.DrawFn, copy: Any, how: str) -> None:
    node = copy
    while node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
            node = inner
            continue
        break
    if not node:
        return
    if how == "change":
        node[key] = deepcopy(draw(st.sampled_from(ODD_VALUES)))
    elif how == "remove" or not isinstance(node, dict):
        del node[key]
    else:
        node[draw(st.sampled_from(["x", "../x", "/etc/passwd", "a/b", ""]))] = node.pop(key)
