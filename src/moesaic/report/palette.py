"""Color palette of charts and diagrams: five colors, distinct in every kind of color vision.

They are from Okabe and Ito's set (Wong 2011, Nature Methods 8:441), lightened for the dark theme.
No information is in color alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaletteColor:
    """A color on a light and on a dark background, and its usual meaning."""

    name: str
    light: str
    dark: str
    use: str


PALETTE = (
    PaletteColor("blue", "#0072b2", "#56b4e9", "the model; experts used more than uniformly"),
    PaletteColor("orange", "#c77700", "#e9a23b", "copying the source"),
    PaletteColor("green", "#00805d", "#3cc79b", "the translation memory"),
    PaletteColor("red", "#c24e00", "#f0855a", "warnings; experts used less than uniformly"),
    PaletteColor("purple", "#a8518a", "#d996c0", "a further series"),
)

_BACKGROUND_COLORS = {
    "page": ("#f5f6f8", "#101418"),
    "card": ("#ffffff", "#181d23"),
    "ink": ("#17202a", "#e6eaee"),
    "soft": ("#4c5966", "#aab4be"),
    "faint": ("#6b7783", "#8b96a1"),
    "line": ("#dde2e7", "#2b333c"),
    "wash": ("#eef1f4", "#20272f"),
}


def css_variables() -> str:
    """Return ``:root`` rules that define every color as a variable, light first, then dark."""
    pairs = _BACKGROUND_COLORS | {c.name: (c.light, c.dark) for c in PALETTE}
    light, dark = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    return (
        f":root{{color-scheme:light dark;{_css_rules(light)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{_css_rules(dark)}}}}}\n"
        f"@media print{{:root{{color-scheme:light;{_css_rules(light)}}}}}\n"
    )


def series_color(index: int) -> str:
    """Return the CSS color of the n-th series; they repeat after five."""
    return f"var(--{PALETTE[index % len(PALETTE)].name})"


def _css_rules(values: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in values.items())
