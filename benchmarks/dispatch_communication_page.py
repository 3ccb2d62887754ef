"""The tables of the guide's page about communication volume, between its markers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.core.markdown import markdown_table

MARKS = re.compile(r"(<!-- dispatch: begin -->\n).*?(<!-- dispatch: end -->)", re.S)


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the tables into the page."""
    text = path.read_text(encoding="utf-8")
    tables = tables_of(result)
    path.write_text(MARKS.sub(lambda m: m[1] + tables + m[2], text), encoding="utf-8")


def tables_of(result: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = (_meshes, _folding, _projection, _hierarchical, _adaptive)
    return "\n".join(part(result) for part in parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return markdown_table(head, (map(_cell, row) for row in rows), right=True)


def _cell(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _both(counted: float, closed: float) -> str:
    """One number if they agree, and both if they do not."""
    same = counted == closed
    return _cell(counted) if same else f"**{_cell(counted)}, expected {_cell(closed)}**"


def _meshes(result: Mapping[str, Any]) -> str:
    head = ("experts over", "expert axis", "model axis", "data axis", "rows between nodes")
    rows = [
        (
            row["mesh"],
            *(_both(row["counted"][a], row["closed"][a]) for a in ("expert", "model", "data")),
            row["inter_node_rows"],
        )
        for row in result["meshes"]
    ]
    return (
        "**All ranks, or a row of the data axis.** Rows never leave the expert axis of a "
        "(data, expert, model) mesh (2405.15052, table 1); the price is an all-reduce of the "
        "experts' gradients over their replicas, once per step and not per micro-batch, and the "
        "all-gather of rows over the model axis.\n\n" + _table(head, rows)
    )


def _folding(result: Mapping[str, Any]) -> str:
    rows = [
        (
            row["expert_group"],
            _both(row["counted"], row["closed"]),
            _both(row["counted_inter_node"], row["closed_inter_node"]),
        )
        for row in result["folding"]
    ]
    return (
        "**Folded.** Dense layers of tensor degree 2 and data degree 4, experts over four ranks: "
        "those of the data axis, or four consecutive ones (2504.14960).\n\n"
        + _table(("four ranks that share the experts", "bytes", "between nodes"), rows)
    )


def _projection(result: Mapping[str, Any]) -> str:
    part = result["projection"]
    ratio = (
        f"exactly {part['ratio']:g}"
        if part["ratio"] == part["closed"]
        else f"**{part['ratio']}, expected {part['closed']}**"
    )
    rows = [("full rows", part["full"]), ("DownProjection(ratio=0.25)", part["projected"])]
    return (
        "**Down-projected.** Rows are projected down before dispatch (BigMac, 2502.16927); summed "
        f"over ranks, the same uneven routing: the ratio is {ratio}.\n\n"
        + _table(("dispatch", "bytes"), rows)
    )


def _hierarchical(result: Mapping[str, Any]) -> str:
    rows = [
        (
            row["per_token"],
            _both(row["counted_flat"], row["closed_flat"]),
            _both(row["counted_hierarchical"], row["closed_hierarchical"]),
            f"{row['counted_hierarchical'] / row['counted_flat']:.2f}",
        )
        for row in result["hierarchical"]
    ]
    head = ("experts per token", "flat", "hierarchical", "ratio")
    return (
        "**Between nodes.** A hierarchical all-to-all sends a token to a node once for all its "
        "experts there, and 16 bytes per edge; the row counts that both methods exchange are "
        "included. With one expert per token it saves nothing.\n\n" + _table(head, rows)
    )


def _adaptive(result: Mapping[str, Any]) -> str:
    candidates = list(result["adaptive"][0]["counted"])
    rows = [
        (
            row["capacity_factor"],
            *(
                _both(row["counted"][candidate], row["closed"][candidate])
                for candidate in candidates
            ),
            row["selected"],
        )
        for row in result["adaptive"]
    ]
    return (
        "**Rows or weights.** Two experts, each sliced over the four ranks of a node (Tutel, "
        "2206.03382): a row is repeated r times and slices are gathered from 4/r ranks; with r=0 "
        "all weights are gathered. The last column is the selection of `AdaptiveDispatcher`, by "
        "bytes.\n\n" + _table(("rows: capacity factor", *candidates, "selected"), rows)
    )
