"""Charts: lines, bars, and dots with intervals, as inline SVG.

Every chart has a title for screen readers; colours are CSS variables, so the theme decides.

Scales: numbers to pixels, round tick marks, and thinning of long curves.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.report.html import Html, join_html, tag
from moesaic.report.palette import series_color as colour

_DASHES = (None, "5 3", "2 2")


_MARKER_SHAPES = ("circle", "square", "diamond")


@dataclass(frozen=True, slots=True)
class AxisScale:
    """A linear map from ``low..high`` to the pixels ``start..end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True, slots=True)
class ChartSeries:
    """A curve. ``tint`` picks the house colour, ``dash`` the stroke (0 is solid)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dash: int = 0


@dataclass(frozen=True, slots=True)
class IntervalDot:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ChartFrame:
    """The pixels of a chart and of the margins around its plot."""

    width: int = 440
    height: int = 230
    left: int = 44
    right: int = 14
    top: int = 10
    bottom: int = 26


def line_chart(
    curves: Sequence[ChartSeries],
    *,
    title: str,
    from_zero: bool = False,
    frame: ChartFrame | None = None,
    x_label: str = "step",
) -> Html:
    """Draw curves over ``across``, with a legend; the page's script adds a reading at the pointer.

    ``zero`` begins the other axis there.
    """
    box = frame or ChartFrame()
    thinned = [(c, *thin_curve(c.x, c.y)) for c in curves]
    drawn = [item for item in thinned if item[1]]
    if not drawn:
        return figure(title, body=tag("p", "No values.", class_="gap"))
    xs = [v for _, x, _ in drawn for v in x]
    flat = AxisScale(min(xs), max(xs), box.left, box.width - box.right)
    low, high = axis_range([v for _, _, y in drawn for v in y], from_zero=from_zero)
    up = AxisScale(low, high, box.height - box.bottom, box.top)
    told = [
        {"name": c.name, "tint": colour(c.color), "x": x, "y": [float(f"{v:.5g}") for v in y]}
        for c, x, y in drawn
    ]
    plot = tag(
        "svg",
        tag("title", title),
        _grid(flat, up, box, x_label),
        *(_curve(c, x, y, (flat, up)) for c, x, y in drawn),
        tag("line", class_="cursor", y1=box.top, y2=box.height - box.bottom, x1=-9, x2=-9),
        viewBox=f"0 0 {box.width} {box.height}",
        class_="lines",
        role="img",
        data_curves=json.dumps(told, ensure_ascii=False),
        data_scale=json.dumps([flat.low, flat.high, flat.start, flat.end]),
        data_across=x_label,
    )
    return figure(title, body=plot, legend=[(c.name, c.color, c.dash) for c, _, _ in drawn])


def bar_chart(rows: Sequence[tuple[str, float]], *, title: str, color: int = 0) -> Html:
    """Draw labelled horizontal bars from zero, in the given order."""
    if not rows:
        return figure(title, body=tag("p", "No values.", class_="gap"))
    width, step, left = 440, 20, 132
    across = AxisScale(0.0, max(v for _, v in rows) or 1.0, left, width - 48)
    parts = []
    for i, (name, value) in enumerate(rows):
        y = i * step
        parts += [
            tag("text", name, x=left - 8, y=y + 14, text_anchor="end"),
            tag(
                "rect",
                x=left,
                y=y + 3,
                width=max(1.0, across(value) - left),
                height=step - 7,
                rx=2,
                fill=colour(color),
            ),
            tag("text", f"{value:.2f}", x=across(value) + 6, y=y + 14, class_="value"),
        ]
    body = tag(
        "svg",
        tag("title", title),
        *parts,
        viewBox=f"0 0 {width} {len(rows) * step + 4}",
        role="img",
    )
    return figure(title, body=body)


def stacked_bar(parts: Sequence[tuple[str, float, str]], *, title: str) -> Html:
    """Draw one bar cut into shares; each part is (name, size, what to show)."""
    total = sum(size for _, size, _ in parts) or 1.0
    cuts = [
        tag(
            "span",
            class_=f"cut tint{i % 5}",
            style=f"flex-grow:{max(size / total, 0.004):.4f}",
            title=f"{name}: {shown}",
        )
        for i, (name, size, shown) in enumerate(parts)
    ]
    names = [
        tag("li", tag("i", class_=f"tint{i % 5}"), name, " ", tag("b", shown))
        for i, (name, _, shown) in enumerate(parts)
    ]
    body = join_html([tag("div", *cuts, class_="share"), tag("ul", *names, class_="legend")])
    return figure(title, body=body)


def dot_chart(
    rows: Sequence[tuple[str, Sequence[IntervalDot | None]]],
    *,
    systems: Sequence[str],
    title: str,
    note: str = "line: 95 % interval",
    digits: int = 1,
    max_value: float = 0.0,
) -> Html:
    """Draw per row one mark with its interval for each system; shapes differ as colours do.

    The axis goes from zero to the highest value, or to ``most``.

    The plot's positions are percentages: it fills whatever width there is, letters keep their size.
    """
    top, left, step = 26, 12 + round(7.4 * max((len(name) for name, _ in rows), default=0)), 32
    height = top + step * len(rows) + 6
    high = max((d.high for _, dots in rows for d in dots if d), default=1.0)
    high = max(high, max_value)
    marks = tick_values(0.0, high, count=6)
    across = AxisScale(0.0, max(high, marks[-1]) * 1.02, 1.5, 98.5)
    stripes = [
        tag("rect", x=0, y=top + i * step, width="100%", height=step, class_="stripe")
        for i in range(0, len(rows), 2)
    ]
    grid = _vertical_grid(marks, across, top=top, height=height)
    between = (step - 16) / max(len(systems) - 1, 1)
    dots = [
        _interval_dot(
            dot,
            index=j,
            y=top + i * step + 8 + between * j,
            across=across,
            label=_dot_label(name, dot, digits=digits),
        )
        for i, (name, found) in enumerate(rows)
        for j, dot in enumerate(found)
        if dot
    ]
    names = [
        tag("text", name, x=left - 10, y=top + (i + 0.5) * step + 4, text_anchor="end")
        for i, (name, _) in enumerate(rows)
    ]
    size = f"height:{height}px"
    labels = tag("svg", *stripes, *names, width=left, height=height, style=f"width:{left}px;{size}")
    plot = tag(
        "svg",
        tag("title", title),
        *stripes,
        *grid,
        *dots,
        role="img",
        style=f"width:100%;{size}",
    )
    keys = [tag("li", _legend_marker(j), name) for j, name in enumerate(systems)]
    legend = tag("ul", *keys, tag("li", note, class_="soft"), class_="legend")
    return figure(title, body=join_html([legend, tag("div", labels, plot, class_="dots")]))


def figure(title: str, *, body: Html, legend: Sequence[tuple[str, int, int]] = ()) -> Html:
    """Put a heading over a chart, and a legend where there is more than one curve."""
    items = [
        tag(
            "li",
            tag(
                "svg",
                tag("line", x1=0, x2=18, y1=5, y2=5, stroke=colour(t), stroke_dasharray=_DASHES[d]),
                viewBox="0 0 18 10",
                class_="key",
                aria_hidden="true",
            ),
            name,
        )
        for name, t, d in legend
    ]
    shown = tag("ul", *items, class_="legend") if len(items) > 1 else None
    return tag("figure", tag("figcaption", title), shown, body)


def _grid(across: AxisScale, up: AxisScale, box: ChartFrame, name: str) -> Html:
    parts = []
    for value in tick_values(up.low, up.high, count=5):
        y = up(value)
        parts.append(tag("line", x1=box.left, x2=box.width - box.right, y1=y, y2=y, class_="grid"))
        parts.append(
            tag(
                "text",
                format_tick(value),
                x=box.left - 7,
                y=y + 4,
                text_anchor="end",
                class_="axis",
            )
        )
    for value in tick_values(across.low, across.high, count=5):
        parts.append(
            tag(
                "text",
                format_tick(value),
                x=across(value),
                y=box.height - 8,
                text_anchor="middle",
                class_="axis",
            )
        )
    parts.append(
        tag(
            "text",
            name,
            x=box.left - 7,
            y=box.height - 8,
            text_anchor="end",
            class_="axis",
        )
    )
    return tag("g", *parts)


def _curve(
    curve: ChartSeries, x: Sequence[float], y: Sequence[float], scales: tuple[AxisScale, AxisScale]
) -> Html:
    across, up = scales
    points = [f"{across(a)} {up(b)}" for a, b in zip(x, y, strict=True)]
    if len(points) == 1:
        return tag("circle", cx=across(x[0]), cy=up(y[0]), r=3, fill=colour(curve.color))
    return tag(
        "path",
        d="M" + "L".join(points),
        stroke=colour(curve.color),
        stroke_dasharray=_DASHES[curve.dash % 3],
        class_="curve",
    )


def _interval_dot(dot: IntervalDot, *, index: int, y: float, across: AxisScale, label: str) -> Html:
    ends = {"x1": f"{across(dot.low)}%", "x2": f"{across(dot.high)}%", "y1": y, "y2": y}
    return tag(
        "g",
        tag("title", label),
        tag("line", **ends, stroke=colour(index), class_="span"),
        tag("svg", _marker(index), x=f"{across(dot.value)}%", y=y, class_="spot"),
    )


def _vertical_grid(
    marks: Sequence[float], across: AxisScale, *, top: float, height: float
) -> list[Html]:
    lines = [
        tag("line", x1=x, x2=x, y1=top - 4, y2=height - 6, class_="grid")
        for x in (f"{across(value)}%" for value in marks)
    ]
    numbers = [
        tag("text", format_tick(v), x=f"{across(v)}%", y=14, text_anchor="middle", class_="axis")
        for v in marks
    ]
    return lines + numbers


def _dot_label(name: str, dot: IntervalDot, *, digits: int) -> str:
    interval = f" ({dot.low:.{digits}f} to {dot.high:.{digits}f})" if dot.high > dot.low else ""
    return f"{name}: {dot.value:.{digits}f}{interval}"


def _marker(index: int) -> Html:
    """A mark around the origin."""
    shape, tint = _MARKER_SHAPES[index % 3], colour(index)
    if shape == "circle":
        return tag("circle", r=4.4, fill=tint, class_="mark")
    turn = "rotate(45)" if shape == "diamond" else None
    return tag(
        "rect", x=-3.6, y=-3.6, width=7.2, height=7.2, fill=tint, transform=turn, class_="mark"
    )


def _legend_marker(index: int) -> Html:
    return tag("svg", _marker(index), viewBox="-9 -6 18 12", class_="key", aria_hidden="true")


MAX_POINTS = 240  # a curve is drawn with at most this many


def tick_values(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) in low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def axis_range(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """Return a range that holds the finite values, widened a little; from zero if asked."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if from_zero:
        low = min(low, 0.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def format_tick(value: float) -> str:
    """``12000 -> '12k'``, ``0.0015 -> '0.0015'``: for axes."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.0e}" if size < 1e-4 else f"{value:.4g}"


def thin_curve(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until at most ``MAX_POINTS`` are left; values that are not finite go."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, math.ceil(len(kept) / MAX_POINTS))
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    return (
        [group[-1][0] for group in groups],
        [sum(b for _, b in group) / len(group) for group in groups],
    )
