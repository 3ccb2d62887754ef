"""Markup of software strings that cleaning removes: tags, entities, keyboard accelerators."""

import html
import re
from itertools import repeat

from moesaic.corpus.placeholders import find_placeholders, is_tag, replace_placeholders

_TAG = re.compile(r"</?([A-Za-z][\w:.-]*)(?:\s[^<>]{0,1500})?/?>")
_BLOCK = re.compile(
    r"br|p|li|div|tr|td|th|h1|h2|h3|h4|h5|h6|dd|dt|hr|ul|ol|table|option|"
    r"nl|para|item|list|title|note|tip|warning",  # KDE's
    re.IGNORECASE,
)


def strip_tags(text: str) -> str:
    """Remove tags; keep words in angle brackets, such as ``<file>`` in a usage line."""
    if "<" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if not is_tag(match[0], name=name, whole=text):
            return match[0]
        return " " if _BLOCK.fullmatch(name) else ""

    return _TAG.sub(replace, text)


def is_block_tag(text: str) -> bool:
    """Whether a text is one tag of HTML that separates words, such as ``<br/>``."""
    match = _TAG.fullmatch(text)
    return match is not None and _BLOCK.fullmatch(match[1]) is not None


def is_inline_tag(text: str) -> bool:
    """Whether a text is one tag of HTML within a line, such as ``<b>`` or ``</a>``."""
    match = _TAG.fullmatch(text)
    if match is None or _BLOCK.fullmatch(match[1]):
        return False
    return is_tag(f"<{match[1]}>", name=match[1], whole="")


def unescape_entities(text: str) -> str:
    """Decode HTML entities such as ``&amp;``."""
    return html.unescape(text) if "&" in text and ";" in text else text


_HELD = "\0"  # in place of a placeholder
_APPENDED = re.compile(r"\s?\([_&~][A-Za-z0-9]\)")  # CJK menus: ファイル(_F)
_LEADING = {
    "_": re.compile(r"(?<![\w\\/.%$@{(=\"'`_-])_(?=[^\W_])"),
    "&": re.compile(r"(?<![\w&])&(?=[^\W_])"),
    "~": re.compile(r"(?<![\w~/])~(?=[^\W_])"),
}
_INNER = {
    "_": re.compile(r"(?<=[^\W\d_])_(?=[^\W\d_])"),
    "&": re.compile(r"(?<=[^\W\d_])&(?=[^\W\d_])"),
    "~": re.compile(r"(?<=[^\W\d_])~(?=[^\W\d_])"),
}


def may_hold_accelerator(text: str) -> bool:
    """Whether ``strip_accelerators`` could change the text at all."""
    return "_" in text or "&" in text or "~" in text


def strip_accelerators(text: str, *, other: str = "") -> str:
    """Remove the mark of a menu's keyboard accelerator: ``_File``, ``E&xit``, ``Sa~ve``, ``(_F)``.

    A word that has its mark on the ``other`` side too is an identifier such as ``file_name``, and
    is kept; so are marks within placeholders, tags and URLs.
    """
    if not may_hold_accelerator(text):
        return text
    held = [found.text for found in find_placeholders(text)]
    if not held or _HELD in text:
        return _strip_marks(text, other=other)
    blanked = _strip_marks(replace_placeholders(text, repeat(_HELD)), other=other)
    pieces = blanked.split(_HELD)
    return "".join([pieces[0], *(h + piece for h, piece in zip(held, pieces[1:], strict=True))])


def _strip_marks(text: str, *, other: str) -> str:
    text = _APPENDED.sub("", text)
    for mark, leading in _LEADING.items():
        if text.count(mark) != 1 or "://" in text:
            continue
        stripped = leading.sub("", text)
        if stripped == text and not _is_identifier(text, mark=mark, other=other):
            stripped = _INNER[mark].sub("", text)
        text = stripped
    return text


def _is_identifier(text: str, *, mark: str, other: str) -> bool:
    word = next((w for w in text.split() if mark in w), "").strip(".,:;!?()\"'")
    before, _, after = word.partition(mark)
    initials = before.isupper() and after.isupper()  # R&D
    return (
        initials or "=" in word or bool(find_placeholders(word)) or (bool(word) and word in other)
    )
