"""LibreOffice's help: the paragraphs and headings of its HTML pages, by their ids.

Where a text differs between systems or programs (``Command`` on a Mac, ``Ctrl`` elsewhere), the
page holds every variant and shows one; only the default is read. Listings of code are left out.
"""

import re
from collections import Counter
from collections.abc import Iterator

from moesaic.data.markup import strip_tags, unescape_entities
from moesaic.data.readers.keyed import KeyedText

_BLOCK = re.compile(
    r'<(p|h[1-6])\s+id="((?:par|hd)_[^"]+)"([^>]*)>(.*?)</\1>', re.DOTALL | re.IGNORECASE
)
_CODE = re.compile(r'class="[^"]*code[^"]*"')
_SPAN = re.compile(r"<(/?)span\b([^>]*)>")
_HIDDEN = re.compile(r'\bhidden="true"')
_DEFAULT = re.compile(r'\bid="default')
_INLINE = re.compile(r'<(?:span\b[^>]*\bclass="([\w ]+)"|(a)\s[^>]*\bhref=|(sup|sub)\b)')
_LAYOUT = ("switchinline", "avis")  # wrap whatever stands there: no part of the text


def parse_help_page(page: str) -> Iterator[KeyedText]:
    """Yield the texts of a page; ``marks`` names their inline elements, sorted.

    Never raises: what is no such paragraph is passed over.
    """
    for match in _BLOCK.finditer(page):
        _, key, attributes, inner = match.groups()
        if _CODE.search(attributes):
            continue
        shown = _without_variants(inner)
        text = " ".join(unescape_entities(strip_tags(shown)).split())
        if text:
            yield KeyedText(key, text, _inline_elements(shown))


def _without_variants(inner: str) -> str:
    """Take out the spans that are hidden and not the default, with all inside them."""
    if "hidden=" not in inner:
        return inner
    kept: list[str] = []
    at, depth, hidden = 0, 0, 0  # hidden: the depth of the outermost span left out
    for match in _SPAN.finditer(inner):
        if not hidden:
            kept.append(inner[at : match.start()])
        at = match.end()
        if match[1]:
            leaves = hidden == depth
            hidden = 0 if leaves else hidden
            depth -= 1
            kept += [] if leaves or hidden else [match[0]]
            continue
        depth += 1
        if not hidden and _HIDDEN.search(match[2]) and not _DEFAULT.search(match[2]):
            hidden = depth
        elif not hidden:
            kept.append(match[0])
    return "".join([*kept, "" if hidden else inner[at:]])


def _inline_elements(shown: str) -> tuple[str, ...]:
    found = Counter(next(g for g in m.groups() if g) for m in _INLINE.finditer(shown))
    return tuple(f"{name} {n}" for name, n in sorted(found.items()) if name not in _LAYOUT)
