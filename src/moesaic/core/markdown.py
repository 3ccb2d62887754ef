"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(
    head: Sequence[str], rows: Iterable[Iterable[object]], *, right: bool = False
) -> str:
    """Return a Markdown table, a line a row; ``right`` aligns all columns but the first.

    Numbers have thousands separators, floats one digit; ``|`` and line breaks are escaped.
    """
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    lines = [head, rule, *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
