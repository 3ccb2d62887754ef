"""The tables of the guide's page about bytes on the wire, between its marks."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.core.markdown import markdown_table

MARKS = re.compile(r"(<!-- wire: begin -->\n).*?(<!-- wire: end -->)", re.S)


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the tables into the page."""
    text = path.read_text(encoding="utf-8")
    tables = tables_of(result)
    path.write_text(MARKS.sub(lambda m: m[1] + tables + m[2], text), encoding="utf-8")


def tables_of(result: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = (_meshes, _folding, _narrow, _hops, _lending)
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
    head = ("experts over", "expert axis", "model axis", "data axis", "rows leaving the node")
    rows = [
        (
            row["mesh"],
            *(_both(row["counted"][a], row["closed"][a]) for a in ("expert", "model", "data")),
            row["rows_leaving_node"],
        )
        for row in result["meshes"]
    ]
    return (
        "**All ranks, or a row of the data axis.** Rows never leave the expert axis of a "
        "(data, expert, model) mesh (2405.15052, table 1); what is paid is a sum of the experts' "
        "gradients over their copies, once per step and not per micro-batch, and what slices "
        "repeat over the model axis.\n\n" + _table(head, rows)
    )


def _folding(result: Mapping[str, Any]) -> str:
    rows = [
        (
            row["expert_group"],
            _both(row["counted"], row["closed"]),
            _both(row["counted_leaving"], row["closed_leaving"]),
        )
        for row in result["folding"]
    ]
    return (
        "**Folded.** Dense layers cut in two and copied over four, experts over four ranks: those "
        "of the data axis, or four in a row whatever they are for dense layers (2504.14960).\n\n"
        + _table(("four ranks that share the experts", "bytes", "leaving the node"), rows)
    )


def _narrow(result: Mapping[str, Any]) -> str:
    part = result["narrow"]
    ratio = (
        f"exactly {part['ratio']:g}"
        if part["ratio"] == part["closed"]
        else f"**{part['ratio']}, expected {part['closed']}**"
    )
    rows = [("whole rows", part["whole"]), ("DownProjection(ratio=0.25)", part["narrow"])]
    return (
        "**Narrow.** Rows that descend before they travel (BigMac, 2502.16927), summed over ranks, "
        f"the same routing, which is not even: the ratio is {ratio}.\n\n"
        + _table(("exchange", "bytes"), rows)
    )


def _hops(result: Mapping[str, Any]) -> str:
    rows = [
        (
            row["per_token"],
            _both(row["counted_flat"], row["closed_flat"]),
            _both(row["counted_two_hops"], row["closed_two_hops"]),
            f"{row['counted_two_hops'] / row['counted_flat']:.2f}",
        )
        for row in result["hops"]
    ]
    head = ("experts per token", "flat", "two hops", "ratio")
    return (
        "**Between nodes.** In two hops a token crosses to a node once for all its experts there; "
        "with it go 16 bytes per edge, and the counts of both ways are in these numbers. With one "
        "expert per token there is nothing to save.\n\n" + _table(head, rows)
    )


def _lending(result: Mapping[str, Any]) -> str:
    ways = list(result["lending"][0]["counted"])
    rows = [
        (
            row["capacity_factor"],
            *(_both(row["counted"][way], row["closed"][way]) for way in ways),
            row["chosen"],
        )
        for row in result["lending"]
    ]
    return (
        "**Rows or weights.** Two experts, each cut over the four ranks of a node (Tutel, "
        "2206.03382): a row is repeated r times, slices are lent by 4/r neighbours, and with r=0 "
        "everything is lent. The last column is what `AdaptiveDispatcher` chose from the load, by bytes.\n\n"
        + _table(("rows: capacity factor", *ways, "chosen"), rows)
    )
