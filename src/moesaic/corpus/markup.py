"""Markup in software strings: placeholders, tags, entities, keyboard accelerators."""

import html
import re

_PLACEHOLDER = re.compile(
    r"""
      %\([\w.\s]+\)[#0\-+]*\d*(?:\.\d+)?[a-zA-Z]          # %(name)s
    | %(?:\d+\$)?[#0\-+']*\d*(?:\.\d+)?(?:hh|h|ll|l|z|j|t|L|q)?
      (?:[dius@]|[oxXeEfFgGcrapn](?![A-Za-z]))             # %s %1$5.2f %lu
    | %L?\d+                                               # Qt: %1
    | %[A-Z][A-Z_]{2,}%?                                   # LibreOffice: %PRODUCTNAME
    | %\{[^{}]*\}                                          # %{name}
    | \{\{[^{}]*\}\} | \{%[^{}]*%\}                        # templates
    | \$\{[^{}]*\} | \$\([\w.]+\) | \$[A-Za-z_]\w*         # ${name} $name
    | \{[\w.\[\]$-]*(?:![rsa])?(?::[^{}]*)?\}              # {0} {name!r:>5}
    | &[A-Za-z][\w.-]+;                                    # entities left after unescaping
    """,
    re.VERBOSE,
)
_POSITION = re.compile(r"^%\d+\$")
_SIGNS = re.compile(r"[%{$&]")

_TAG = re.compile(r"<(/?)([A-Za-z][\w:.-]*)((?:\s[^<>]{0,1500})?)(/?)>")
_HTML = re.compile(
    r"a|abbr|b|big|blockquote|body|br|button|center|cite|code|dd|del|dfn|div|dl|dt|em|font|"
    r"form|h1|h2|h3|h4|h5|h6|head|hr|html|i|iframe|img|input|ins|kbd|label|li|link|mark|meta|"
    r"nav|nobr|ol|option|p|path|pre|q|s|samp|script|select|small|span|strike|strong|style|sub|"
    r"sup|svg|table|tbody|td|th|thead|title|tr|tt|u|ul|var",
    re.IGNORECASE,
)
_BLOCK = re.compile(
    r"br|p|li|div|tr|td|th|h1|h2|h3|h4|h5|h6|dd|dt|hr|ul|ol|table|option|"
    r"nl|para|item|list|title|note|tip|warning",  # KDE's
    re.IGNORECASE,
)


def placeholders(text: str) -> tuple[str, ...]:
    """Return the placeholders of ``text``, sorted; both sides of a pair must have the same.

    ``%1$s`` counts as ``%s``: a translation may change the order but not the set.
    """
    if not _SIGNS.search(text):
        return ()
    found = [_POSITION.sub("%", m[0]) for m in _PLACEHOLDER.finditer(text)]
    return tuple(sorted(found))


def without_placeholders(text: str) -> str:
    """Return ``text`` with a space in place of each placeholder."""
    return _PLACEHOLDER.sub(" ", text) if _SIGNS.search(text) else text


def strip_tags(text: str) -> str:
    """Remove tags; keep words in angle brackets, such as ``<file>`` in a usage line."""
    if "<" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        closing, name, attributes, empty = match.groups()
        known = bool(_HTML.fullmatch(name)) or "=" in attributes or closing or empty
        if not known and f"</{name}>" not in text:
            return match[0]
        return " " if _BLOCK.fullmatch(name) else ""

    return _TAG.sub(replace, text)


def is_block_tag(text: str) -> bool:
    """Whether a text is one tag of HTML that separates words, such as ``<br/>``."""
    match = _TAG.fullmatch(text)
    return match is not None and _BLOCK.fullmatch(match[2]) is not None


def is_inline_tag(text: str) -> bool:
    """Whether a text is one tag of HTML within a line, such as ``<b>`` or ``</a>``."""
    match = _TAG.fullmatch(text)
    return match is not None and bool(_HTML.fullmatch(match[2])) and not is_block_tag(text)


def unescape_entities(text: str) -> str:
    """Decode HTML entities such as ``&amp;``."""
    return html.unescape(text) if "&" in text and ";" in text else text


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
    is kept.
    """
    if not may_hold_accelerator(text):
        return text
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
    return initials or "=" in word or bool(placeholders(word)) or (bool(word) and word in other)
