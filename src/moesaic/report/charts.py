"""Charts as inline SVG: lines, bars, and dots with confidence intervals.

Every chart has a title for screen readers. Colors are CSS variables, so they follow the theme.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.report.html import Html, join_html, tag
from moesaic.report.palette import series_color

MAX_POINTS = 240  # of a drawn curve
_LETTER = 7.0  # pixels of a wide letter at the size of labels
_MAX_LABEL = 30  # letters of a bar's label
_DASHES = (None, "5 3", "2 2")


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
    """A curve: ``color`` is an index of the palette, ``dash`` of the strokes (0 is solid)."""

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
    """Size of a chart and of the margins around its plot, in pixels."""

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
    """Draw curves over ``x_label``, with a legend; the page's script shows values at the pointer.

    ``from_zero`` starts the y axis at zero.
    """
    box = frame or ChartFrame()
    thinned = [(c, *thin_curve(c.x, c.y)) for c in curves]
    drawn = [item for item in thinned if item[1]]
    if not drawn:
        return figure(title, body=tag("p", "No values.", class_="gap"))
    xs = [v for _, x, _ in drawn for v in x]
    x_scale = AxisScale(min(xs), max(xs), box.left, box.width - box.right)
    low, high = axis_range([v for _, _, y in drawn for v in y], from_zero=from_zero)
    y_scale = AxisScale(low, high, box.height - box.bottom, box.top)
    data = [
        {"name": c.name, "tint": series_color(c.color), "x": x, "y": [float(f"{v:.5g}") for v in y]}
        for c, x, y in drawn
    ]
    plot = svg(
        title,
        _grid(x_scale, y_scale, box, x_label),
        *(_curve(c, x, y, (x_scale, y_scale)) for c, x, y in drawn),
        tag("line", class_="cursor", y1=box.top, y2=box.height - box.bottom, x1=-9, x2=-9),
        size=(box.width, box.height),
        class_="lines",
        data_curves=json.dumps(data, ensure_ascii=False),
        data_scale=json.dumps([x_scale.low, x_scale.high, x_scale.start, x_scale.end]),
        data_across=x_label,
    )
    return figure(title, body=plot, legend=[c for c, _, _ in drawn])


def bar_chart(rows: Sequence[tuple[str, float]], *, title: str, color: int = 0) -> Html:
    """Draw labelled horizontal bars from zero, in the given order."""
    if not rows:
        return figure(title, body=tag("p", "No values.", class_="gap"))
    width, step = 440, 20
    left = 12 + round(_LETTER * min(_MAX_LABEL, max(len(name) for name, _ in rows)))
    scale = AxisScale(0.0, max(v for _, v in rows) or 1.0, left, width - 48)
    bar = {"x": left, "height": step - 7, "rx": 2, "fill": series_color(color)}
    parts = []
    for i, (name, value) in enumerate(rows):
        y, end = i * step, scale(value)
        parts += [
            _bar_label(name, x=left - 8, y=y + 14),
            tag("rect", y=y + 3, width=max(1.0, end - left), **bar),
            svg_text(f"{value:.2f}", x=end + 6, y=y + 14, anchor=None, class_="value"),
        ]
    return figure(title, body=svg(title, *parts, size=(width, len(rows) * step + 4)))


def _bar_label(name: str, *, x: float, y: float) -> Html:
    """Return a label that ends at ``x``; a long one is shortened, and whole in its tooltip."""
    if len(name) <= _MAX_LABEL:
        return svg_text(name, x=x, y=y, class_=None)
    shown = f"{name[: _MAX_LABEL - 1]}…"
    return tag("text", tag("title", name), shown, x=x, y=y, text_anchor="end")


def stacked_bar(parts: Sequence[tuple[str, float, str]], *, title: str) -> Html:
    """Draw one bar divided into shares; each part is (name, size, label)."""
    total = sum(size for _, size, _ in parts) or 1.0
    shares, names = [], []
    for i, (name, size, label) in enumerate(parts):
        grow = f"flex-grow:{max(size / total, 0.004):.4f}"
        shares.append(tag("span", class_=f"cut tint{i % 5}", style=grow, title=f"{name}: {label}"))
        names.append(tag("li", tag("i", class_=f"tint{i % 5}"), name, " ", tag("b", label)))
    body = join_html([tag("div", *shares, class_="share"), tag("ul", *names, class_="legend")])
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
    """Draw per row one mark with its interval for each system, in its own shape and color.

    The axis runs from zero to the highest value, at least to ``max_value``. Positions in the plot
    are percentages: it fills the width of the page, and letters keep their size.
    """
    top, left, step = 26, 12 + round(7.4 * max((len(name) for name, _ in rows), default=0)), 32
    height = top + step * len(rows) + 6
    high = max((d.high for _, dots in rows for d in dots if d), default=1.0)
    high = max(high, max_value)
    ticks = tick_values(0.0, high, count=6)
    scale = AxisScale(0.0, max(high, ticks[-1]) * 1.02, 1.5, 98.5)
    stripes = [
        tag("rect", x=0, y=top + i * step, width="100%", height=step, class_="stripe")
        for i in range(0, len(rows), 2)
    ]
    grid = []
    for value in ticks:
        x = f"{scale(value)}%"
        grid.append(tag("line", x1=x, x2=x, y1=top - 4, y2=height - 6, class_="grid"))
        grid.append(svg_text(format_tick(value), x=x, y=14, anchor="middle"))
    between = (step - 16) / max(len(systems) - 1, 1)
    dots = [
        _interval_dot(
            dot,
            index=j,
            y=top + i * step + 8 + between * j,
            scale=scale,
            label=_dot_label(name, dot, digits=digits),
        )
        for i, (name, row) in enumerate(rows)
        for j, dot in enumerate(row)
        if dot
    ]
    names = [
        svg_text(name, x=left - 10, y=top + (i + 0.5) * step + 4, class_=None)
        for i, (name, _) in enumerate(rows)
    ]
    size = f"height:{height}px"
    labels = tag("svg", *stripes, *names, width=left, height=height, style=f"width:{left}px;{size}")
    plot = svg(title, *stripes, *grid, *dots, style=f"width:100%;{size}")
    keys = [tag("li", _key(_marker(j), box="-9 -6 18 12"), name) for j, name in enumerate(systems)]
    legend = tag("ul", *keys, tag("li", note, class_="soft"), class_="legend")
    return figure(title, body=join_html([legend, tag("div", labels, plot, class_="dots")]))


def figure(title: str, *, body: Html, legend: Sequence[ChartSeries] = ()) -> Html:
    """Put a heading over a chart, and a legend if there is more than one curve."""
    items = []
    for curve in legend:
        stroke = {"stroke": series_color(curve.color), "stroke_dasharray": _DASHES[curve.dash]}
        line = tag("line", x1=0, x2=18, y1=5, y2=5, **stroke)
        items.append(tag("li", _key(line, box="0 0 18 10"), curve.name))
    shown = tag("ul", *items, class_="legend") if len(items) > 1 else None
    return tag("figure", tag("figcaption", title), shown, body)


def svg(
    title: str,
    *parts: Html,
    size: tuple[float, float] | None = None,
    **attributes: str | float | None,
) -> Html:
    """Return an SVG image with a title for screen readers; ``size`` is that of its view box."""
    box = f"0 0 {size[0]} {size[1]}" if size else None
    return tag("svg", tag("title", title), *parts, viewBox=box, role="img", **attributes)


def _key(mark: Html, *, box: str) -> Html:
    return tag("svg", mark, viewBox=box, class_="key", aria_hidden="true")


def svg_text(
    content: str | int,
    *,
    x: float | str,
    y: float,
    anchor: str | None = "end",
    class_: str | None = "axis",
) -> Html:
    """Return a text of an SVG image, an axis label by default."""
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def _grid(x_scale: AxisScale, y_scale: AxisScale, box: ChartFrame, x_label: str) -> Html:
    parts = []
    left, below = box.left - 7, box.height - 8
    for value in tick_values(y_scale.low, y_scale.high, count=5):
        y = y_scale(value)
        parts.append(tag("line", x1=box.left, x2=box.width - box.right, y1=y, y2=y, class_="grid"))
        parts.append(svg_text(format_tick(value), x=left, y=y + 4))
    parts += [
        svg_text(format_tick(value), x=x_scale(value), y=below, anchor="middle")
        for value in tick_values(x_scale.low, x_scale.high, count=5)
    ]
    return tag("g", *parts, svg_text(x_label, x=left, y=below))


def _curve(
    curve: ChartSeries, x: Sequence[float], y: Sequence[float], scales: tuple[AxisScale, AxisScale]
) -> Html:
    x_scale, y_scale = scales
    color = series_color(curve.color)
    points = [f"{x_scale(a)} {y_scale(b)}" for a, b in zip(x, y, strict=True)]
    if len(points) == 1:
        return tag("circle", cx=x_scale(x[0]), cy=y_scale(y[0]), r=3, fill=color)
    dash = _DASHES[curve.dash % 3]
    return tag(
        "path", d="M" + "L".join(points), stroke=color, stroke_dasharray=dash, class_="curve"
    )


def _interval_dot(dot: IntervalDot, *, index: int, y: float, scale: AxisScale, label: str) -> Html:
    ends = {"x1": f"{scale(dot.low)}%", "x2": f"{scale(dot.high)}%", "y1": y, "y2": y}
    return tag(
        "g",
        tag("title", label),
        tag("line", **ends, stroke=series_color(index), class_="span"),
        tag("svg", _marker(index), x=f"{scale(dot.value)}%", y=y, class_="spot"),
    )


def _dot_label(name: str, dot: IntervalDot, *, digits: int) -> str:
    interval = f" ({dot.low:.{digits}f} to {dot.high:.{digits}f})" if dot.high > dot.low else ""
    return f"{name}: {dot.value:.{digits}f}{interval}"


def _marker(index: int) -> Html:
    """Return a circle, a square or a diamond around the origin."""
    style = {"fill": series_color(index), "class_": "mark"}
    if index % 3 == 0:
        return tag("circle", r=4.4, **style)
    rotate = "rotate(45)" if index % 3 == 2 else None
    return tag("rect", x=-3.6, y=-3.6, width=7.2, height=7.2, transform=rotate, **style)


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
    """Return a range around the finite values, widened a little; ``from_zero`` includes zero."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if from_zero:
        low = min(low, 0.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def format_tick(value: float) -> str:
    """``12000 -> '12k'``, ``0.0015 -> '0.0015'``: for tick labels."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.0e}" if size < 1e-4 else f"{value:.4g}"


def thin_curve(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until at most ``MAX_POINTS`` are left; drop values that are not finite."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, math.ceil(len(kept) / MAX_POINTS))
    groups = [kept[i : i + size] for i in range(0, len(kept), size)]
    return (
        [group[-1][0] for group in groups],
        [sum(b for _, b in group) / len(group) for group in groups],
    )
