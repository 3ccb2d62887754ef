"""The frame of a page: style, script, navigation and sections in one file without a network."""

from collections.abc import Sequence
from importlib.resources import files

from moesaic.core.version import __version__
from moesaic.report.html import Html, join_html, tag
from moesaic.report.palette import PALETTE, css_variables

# Nothing is loaded from the network, whatever a translation or a file contains.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


def html_page(title: str, *, header: Html, sections: Sequence[tuple[str, str, Html]]) -> str:
    """Return a whole document; each section is (id, title, content)."""
    made = [tag("section", tag("h2", words), body, id=name) for name, words, body in sections]
    links = [tag("a", words, href=f"#{name}") for name, words, _ in sections]
    tints = "".join(f".tint{i}{{--tint:var(--{color.name})}}" for i, color in enumerate(PALETTE))
    style = f"{css_variables()}{tints}\n{_read_asset('page.css')}"
    head = tag(
        "head",
        Html('<meta charset="utf-8"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_CONTENT_SECURITY_POLICY),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    body = tag(
        "body",
        header,
        tag("nav", *links, aria_label="Sections"),
        tag("main", *made),
        tag("footer", f"Written by moesaic {__version__} from the files of the run directory."),
        tag("div", id="tip", role="status"),
        Html(f"<script>{_read_asset('page.js')}</script>"),
    )
    return f'<!doctype html>\n<html lang="en">{join_html([head, body])}</html>\n'


def _read_asset(name: str) -> str:
    return files("moesaic.report").joinpath(name).read_text(encoding="utf-8")


def page_logo() -> Html:
    """Return the logo, some squares of the palette."""
    spots = [(0, 0), (9, 0), (18, 0), (0, 9), (18, 9), (9, 18), (18, 18)]
    squares = [
        tag("rect", x=x, y=y, width=7.5, height=7.5, rx=1.5, fill=f"var(--{PALETTE[i % 5].name})")
        for i, (x, y) in enumerate(spots)
    ]
    return tag("svg", *squares, viewBox="0 0 26 26", class_="logo", aria_hidden="true")
