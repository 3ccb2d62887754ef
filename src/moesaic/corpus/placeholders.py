r"""Placeholders: the parts of a text that a translation must hold unchanged.

Format directives (``%s``, ``{name}``, ``${x}``, ``@x@``), tags, entities, URLs, e-mail addresses,
escapes (``\n``) and Windows paths. One definition serves the cleaning rules, the rate of kept
placeholders in evaluation, and the model's copies of them. Detection is by form: ``{laughs}`` is a
placeholder, and ``$1`` is not, because prices look the same.

Time is linear in the length of a text: every repetition is bounded, or stops at the character that
could start the next match.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

# Characters of a URL: not quotes, brackets, or scripts that are written without spaces
_URL = r"[^\s<>\"`|\\^«»“”„‘’\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]"  # noqa: E501
_FLAGS = r"[#0\-+']{0,4}(?:\*|\d{1,4})?(?:\.(?:\*|\d{1,4})?)?(?:hh|h|ll|l|z|j|t|L|q)?"
_LETTER = "(?![A-Za-z])"

# begin with a letter or digit: searched for only where a text has their signs
_ADDRESSES = rf"""
  (?P<url>
      (?<![A-Za-z0-9])(?:[A-Za-z][A-Za-z0-9+.-]{{1,14}}://|mailto:|tel:\+?(?=\d)|www\.(?=\w)){_URL}+
    | (?<![\w.@%$/-])(?:[A-Za-z0-9][A-Za-z0-9-]{{0,62}}\.){{1,5}}
      (?:com|org|net|io|edu|gov|dev|info)\b(?![.-]?\w)(?:[:/?\#]{_URL}*)?
  )
| (?P<email> (?<![\w.+-])[\w+-][\w.+-]{{0,63}}@(?:[\w-]{{1,63}}\.){{1,6}}[A-Za-z]{{2,24}}\b )
| (?P<path> (?<![A-Za-z0-9])[A-Za-z]:\\[^\s<>"|?*:]* | (?<![\\\w])\\\\\w[\w.-]*\\[^\s<>"|?*:]* )
"""
_MARKUP = rf"""
  (?P<complex> \{{\s{{0,9}}[\w.-]+\s{{0,9}},\s{{0,9}}(?:plural|select|selectordinal)\s{{0,9}}, )
| (?P<printf>
      %%
    | %(?:\d{{1,2}}\$)?[#]@\w{{1,60}}@                            # stringsdict
    | %\([^()%{{}}\n]{{1,80}}\){_FLAGS}[a-zA-Z]                   # %(name)s
    | (?<!\d)%(?:\d{{1,2}}\$)?{_FLAGS}
      (?:[ds@]|[iuoxXeEfFgGcrapnlYmHMSyBbAIjpZC]{_LETTER})        # %s %1$5.2f %lu %Y
    | (?<=\d)%(?:\d{{1,2}}\$)?{_FLAGS}[dsiuxXeEfFgGc@]{_LETTER}   # not the percent of "50%discount"
  )
| (?P<placeholder>
      %L?[1-9]\d?(?![\d$]|[.,]\d)(?:![^!\s]{{1,12}}!|%(?!\w))?    # Qt %1, Windows %1!s!, Boost %1%
    | %\d:[dsufegmnpx]{_LETTER}                                   # Pascal
    | (?<!\d)%[A-Za-z_]\w{{1,60}}%(?![\w(%{{$])                   # %PATH%, %count%
    | %[A-Z][A-Z_]{{2,60}}                                        # LibreOffice: %PRODUCTNAME
    | [%\#]\{{[^{{}}]*\}}[sdif]? | %<\w{{1,60}}>{_FLAGS}[a-zA-Z]?      # Ruby
    | \{{\{{\{{[^{{}}]*\}}\}}\}} | \{{\{{[^{{}}]*\}}\}}           # templates
    | \{{%[^{{}}]*%\}} | \{{\#[^{{}}]*\#\}}
    | \$\{{[^{{}}]*\}} | \$\([\w.-]+\)
    | \$[A-Za-z_]\w*\$(?!\w)                                      # $NAME$
    | \$(?!(?:US|USD|CAN?|CAD|AUD?|NZD?|HKD?|SGD?|MXN?)\b)[A-Za-z_]\w*
    | \{{\s{{0,9}}[$-]?[\w.\[\]-]*(?:\([^(){{}}]*\))?(?:![rsa])?
      (?:\s{{0,9}},\s{{0,9}}(?:(?:number|date|time|datetime|duration|spellout|ordinal|choice|list)
        (?:\s{{0,9}},[^{{}}]*)?|-?\d+))?
      (?::(?:[^{{}}\s]*|%[^{{}}]*))?\s{{0,9}}\}}                  # {{0}} {{name!r:>5}} {{0,date}}
    | @[A-Za-z_][\w.-]{{0,60}}@(?!\w) | (?<![\w.@/])@[A-Za-z_]\w{{1,60}}
  )
| (?P<tag> <!--[^<>]{{0,1500}}--> | <!\[CDATA\[ | \]\]>
    | </?(?:[A-Za-z][\w:.-]*|\d{{1,3}})
      (?:\s(?:(?:"[^"<]*"|'[^'<]*'|[^<>"'])*|[^<>]*))?/?>
    | \[/?(?:b|i|u|s|q|url|img|code|quote|size|color|list|li|center|email|font)
      (?:=[^\[\]\n]{{0,300}})?\]
  )
| (?P<entity> &(?:[A-Za-z][\w.-]+|\#\d{{1,7}}|\#[xX][0-9A-Fa-f]{{1,6}}); )
| (?P<escape> \\(?:[nrtabfv0\\"']|u[0-9A-Fa-f]{{4}}|U[0-9A-Fa-f]{{8}}|x[0-9A-Fa-f]{{2}}|[0-7]{{3}}
    |e\[[0-9;]{{0,12}}m) )
"""
_MARKUP_PATTERN = re.compile(rf"(?=[%\#{{\$&<@\\\[\]])(?:{_MARKUP})", re.VERBOSE)
_PATTERN = re.compile(f"{_ADDRESSES}|{_MARKUP}", re.VERBOSE)
_ADDRESS_SIGNS = re.compile(
    r"://|@|:\\|\\\\|www\.|mailto:|tel:|\.(?:com|org|net|io|edu|gov|dev|info)\b"
)
_SIGNS = re.compile(r"[%{$&<@\\\[]|]]>|" + _ADDRESS_SIGNS.pattern)
_POSITION = re.compile(r"^%(\d{1,2})\$")
_QT_FIRST = re.compile(r"%L?[1-9](?!\d)")
_TAG_PARTS = re.compile(r"[<\[](/?)([A-Za-z][\w:.-]*|\d+)", re.ASCII)
_SENTENCE_END = ".,;:!?'…。、)]}*"
_PAIRS = {")": "(", "]": "[", "}": "{"}
_HTML = re.compile(
    r"a|abbr|b|big|blockquote|body|br|button|center|cite|code|dd|del|dfn|div|dl|dt|em|font|"
    r"form|h[1-6]|head|hr|html|i|iframe|img|input|ins|kbd|label|li|link|mark|meta|nav|nobr|ol|"
    r"option|p|path|pre|q|s|samp|script|select|small|span|strike|strong|style|sub|sup|svg|table|"
    r"tbody|td|th|thead|title|tr|tt|u|ul|var",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A placeholder at ``text[start:end]``.

    ``kind`` is printf, placeholder, complex (ICU plural or select), tag, entity, url, email, path
    or escape. ``key`` is what both sides of a pair must have equally often: the text itself, but
    for printf directives with their argument number (``%s %d`` may become ``%2$d %1$s``, not
    ``%d %s``), and for a complex argument its name and type, as languages differ in their forms.
    """

    text: str
    start: int
    end: int
    kind: str
    key: str


def find_placeholders(text: str) -> tuple[Placeholder, ...]:
    """Return the placeholders of ``text`` in order; they do not overlap."""
    if not _SIGNS.search(text):
        return ()
    return tuple(_number_directives(_scan(text)))


def placeholder_keys(text: str) -> tuple[str, ...]:
    """Return the sorted keys of the placeholders of ``text``: equal on both sides of a pair."""
    return tuple(sorted(found.key for found in find_placeholders(text)))


def without_placeholders(text: str) -> str:
    """Return ``text`` with a space in place of each placeholder."""
    return replace_placeholders(text, repeat(" "))


def replace_placeholders(text: str, replacements: Iterable[str]) -> str:
    """Return ``text`` with its placeholders replaced, in order; the rest stays if they run out."""
    parts, position = [], 0
    for found, replacement in zip(find_placeholders(text), replacements, strict=False):
        parts += [text[position : found.start], replacement]
        position = found.end
    return "".join([*parts, text[position:]])


@dataclass(frozen=True, slots=True)
class PlaceholderRate:
    """How many texts have a placeholder in their source, and how many answers kept all of them.

    An answer keeps them if both have each key equally often. ``placeholders`` counts those of the
    sources, ``kept`` those that are in the answer, ``added`` those that only the answer has.
    """

    texts: int = 0
    kept_texts: int = 0
    placeholders: int = 0
    kept: int = 0
    added: int = 0

    @property
    def rate(self) -> float:
        """The share of texts with placeholders that kept all of them; 1.0 where there is none."""
        return self.kept_texts / self.texts if self.texts else 1.0

    def __add__(self, other: "PlaceholderRate") -> "PlaceholderRate":
        return PlaceholderRate(
            self.texts + other.texts,
            self.kept_texts + other.kept_texts,
            self.placeholders + other.placeholders,
            self.kept + other.kept,
            self.added + other.added,
        )


def compare_placeholders(source: str, answer: str) -> PlaceholderRate:
    """Compare the placeholders of a source and its answer: the rate of one text.

    A placeholder that is only in the answer counts as ``added``, and as a text that did not keep
    its placeholders, also if the source has none.
    """
    expected, found = Counter(placeholder_keys(source)), Counter(placeholder_keys(answer))
    kept = (expected & found).total()
    concerned = bool(expected or found)
    return PlaceholderRate(
        texts=int(concerned),
        kept_texts=int(concerned and expected == found),
        placeholders=expected.total(),
        kept=kept,
        added=found.total() - kept,
    )


def measure_placeholders(sources: Iterable[str], answers: Iterable[str]) -> PlaceholderRate:
    """Return the summed rate of sources and their answers, one answer per source."""
    total = PlaceholderRate()
    for source, answer in zip(sources, answers, strict=True):
        total += compare_placeholders(source, answer)
    return total


def is_tag(text: str, *, name: str, whole: str) -> bool:
    """Whether ``<name ...>`` is a tag and not a word in angle brackets such as ``<file>``.

    A tag is HTML's, or has an attribute, or is closing or empty, or ``whole`` closes it.
    """
    inside = text.startswith("</") or text.endswith("/>") or "=" in text
    known = bool(_HTML.fullmatch(name)) or inside
    return known or f"</{name}>" in whole


def _scan(text: str) -> Iterator[Placeholder]:
    position, ends = 0, None
    closed: dict[str, bool] = {}
    pattern = _PATTERN if _ADDRESS_SIGNS.search(text) else _MARKUP_PATTERN
    while match := pattern.search(text, position):
        start, end, kind = match.start(), match.end(), str(match.lastgroup)
        if kind == "complex":
            ends = _matching_braces(text) if ends is None else ends
            end = ends.get(start, end)
        elif kind == "url":
            end = start + _url_length(match[0])
        if kind == "tag" and not _is_markup(match[0], text, closed):
            position = start + 1
            continue
        if _is_percentage(match[0], kind, text):
            position = end
            continue
        found = text[start:end]
        key = _complex_key(found) if kind == "complex" else found
        yield Placeholder(found, start, end, kind, key)
        position = max(end, start + 1)


def _number_directives(found: Iterable[Placeholder]) -> Iterator[Placeholder]:
    number = 0
    for item in found:
        if item.kind != "printf" or item.text == "%%" or item.text.startswith("%("):
            yield item
            continue
        number += 1
        position = _POSITION.match(item.text)
        rest = item.text[position.end() :] if position else item.text[1:]
        key = f"%{position[1] if position else number}${rest}"
        yield Placeholder(item.text, item.start, item.end, item.kind, key)


def _matching_braces(text: str) -> dict[int, int]:
    """Return the end of every balanced ``{``."""
    opened: list[int] = []
    ends = {}
    for i, character in enumerate(text):
        if character == "{":
            opened.append(i)
        elif character == "}" and opened:
            ends[opened.pop()] = i + 1
    return ends


def _complex_key(text: str) -> str:
    name, kind, *_ = (part.strip() for part in text[1:].split(",", 2))
    return f"{{{name}, {kind}}}"


def _url_length(text: str) -> int:
    """Return the length without the punctuation of the sentence around a URL."""
    counts = Counter(text)
    end = len(text)
    while end and text[end - 1] in _SENTENCE_END:
        last = text[end - 1]
        if last in _PAIRS and counts[last] <= counts[_PAIRS[last]]:
            break
        counts[last] -= 1
        end -= 1
    return end


def _is_markup(tag: str, text: str, closed: dict[str, bool]) -> bool:
    if tag.startswith(("<!", "]]")):
        return True
    parts = _TAG_PARTS.match(tag)
    name = parts[2] if parts else ""
    closing = f"[/{name}]" if tag.startswith("[") else f"</{name}>"
    if closing not in closed:
        closed[closing] = closing in text
    if tag.startswith("["):
        return closed[closing]
    return is_tag(tag, name=name, whole=closing if closed[closing] else "")


def _is_percentage(found: str, kind: str, text: str) -> bool:
    """Whether ``%50`` is a percentage, as Turkish writes it: Qt's arguments begin with ``%1``."""
    if kind != "placeholder" or not found.startswith("%") or not found.lstrip("%L").isdigit():
        return False
    return len(found.lstrip("%L")) > 1 and not _QT_FIRST.search(text)
