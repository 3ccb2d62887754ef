"""The syntax of gettext's PO files: messages of a catalogue, with their comments and lines.

Read as gettext's own lexer does: keywords and strings may share a line, strings that follow each
other are joined, and ``domain "x"`` is allowed. Octal and hexadecimal escapes are bytes in the
catalogue's charset. Reading takes time linear in the size of the text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from moesaic.core.errors import DataError
from moesaic.corpus.readers import limits

_TOKEN = re.compile(
    r"""[ \t\f\v\r]*+(?:
      "(?P<string>(?:[^"\\]++|\\.)*+)"
    | (?P<keyword>msgctxt|msgid_plural|msgid|msgstr|domain)(?![A-Za-z_])
    | \[[ \t]*+(?P<index>[0-9]{1,3})[ \t]*+\]
    | (?P<comment>\#.*+)
    | (?P<end>\Z)
    )""",
    re.VERBOSE | re.DOTALL,
)
_BYTE_ESCAPE = re.compile(r"\\(?:[0-7]|x[0-9A-Fa-f])")
_ESCAPE = re.compile(r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9A-Fa-f]+)|(?P<char>.))", re.DOTALL)
_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a"}
_SIMPLE |= {'"': '"', "\\": "\\"}


@dataclass(frozen=True, slots=True)
class Message:
    """A message: its text, its plural text (or none), and its translations by form.

    ``comment`` is the text of the ``#.`` comments, ``line`` the line of ``msgid`` (0 in a .mo).
    """

    source: str
    targets: tuple[str, ...]
    plural: str | None = None
    comment: str = ""
    line: int = 0
    fuzzy: bool = False
    has_context: bool = False


@dataclass(slots=True)
class _Draft:
    """A message as far as it is read: the strings of each field, still escaped."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    targets: dict[int, list[str]] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    fuzzy: bool = False
    line: int = 0

    @property
    def is_begun(self) -> bool:
        return bool(self.fields)


def parse_messages(text: str, *, charset: str, name: str) -> Iterator[Message]:
    """Yield the messages of a PO file, without obsolete ones (``#~``).

    ``charset`` decodes escaped bytes. Raises DataError with file and line where the text is not PO
    syntax, or a line is longer than ``MAX_LINE_BYTES``.
    """
    yield from _MessageParser(charset, name).parse(text)


class _MessageParser:
    """Assembles messages from tokens, line by line."""

    def __init__(self, charset: str, name: str) -> None:
        self._charset, self._name = charset, name
        self._draft = _Draft()
        self._strings: list[str] | None = None  # where the next string belongs
        self._number = 0

    def parse(self, text: str) -> Iterator[Message]:
        for line in _lines(text):
            self._number += 1
            if len(line) > limits.MAX_LINE_BYTES:
                raise self._error(
                    f"longer than {limits.as_size(limits.MAX_LINE_BYTES)}, the limit of a line; "
                    "break its string into several"
                )
            at = 0
            while match := _TOKEN.match(line, at):
                if match["end"] is not None:
                    break
                if self._ends_message(match):
                    yield self._finished()
                self._add(match)
                at = match.end()
            if match is None:
                raise self._syntax_error(line[at:])
        if self._draft.is_begun:
            yield self._finished()

    def _ends_message(self, token: re.Match[str]) -> bool:
        begins = token["comment"] or token["keyword"] in ("msgctxt", "msgid", "domain")
        return bool(begins and self._draft.targets)

    def _add(self, token: re.Match[str]) -> None:
        if token["string"] is not None:
            if self._strings is None:
                raise self._syntax_error(token[0])
            self._strings.append(token["string"])
        elif token["comment"]:
            self._add_comment(token["comment"])
        elif token["keyword"]:
            self._begin_field(token)
        else:
            self._set_index(token)

    def _begin_field(self, token: re.Match[str]) -> None:
        draft, keyword = self._draft, token["keyword"]
        if keyword == "domain":
            self._strings = []
        elif keyword == "msgstr":
            if "msgid" not in draft.fields or -1 in draft.targets:
                raise self._syntax_error(token[0])
            self._strings = draft.targets.setdefault(-1, [])  # -1: without an index
        else:
            needed = {"msgid_plural": "msgid"}.get(keyword)
            if keyword in draft.fields or (needed and needed not in draft.fields):
                raise self._error(f"found {keyword}, expected msgstr for the msgid before it")
            draft.line = self._number if keyword == "msgid" else draft.line
            self._strings = draft.fields.setdefault(keyword, [])

    def _set_index(self, token: re.Match[str]) -> None:
        targets, index = self._draft.targets, int(token["index"])
        if self._strings is not targets.get(-1) or self._strings or index in targets:
            raise self._syntax_error(token[0])
        del targets[-1]
        self._strings = targets.setdefault(index, [])

    def _add_comment(self, comment: str) -> None:
        if comment.startswith("#~"):  # obsolete, with the comments before it
            self._draft.comments, self._draft.fuzzy = [], False
        elif comment.startswith("#."):
            self._draft.comments.append(comment[2:].strip())
        elif comment.startswith("#,") and "fuzzy" in re.split(r"[,\s]+", comment[2:]):
            self._draft.fuzzy = True

    def _finished(self) -> Message:
        draft, self._draft, self._strings = self._draft, _Draft(), None
        if not draft.targets or "msgid" not in draft.fields:
            raise self._error("the file ends within a message: expected msgid and msgstr")
        draft.targets.setdefault(0, draft.targets.pop(-1, []))
        count = max(draft.targets) + 1
        plural = draft.fields.get("msgid_plural")
        return Message(
            self._text(draft.fields["msgid"]),
            tuple(self._text(draft.targets.get(form, [])) for form in range(count)),
            None if plural is None else self._text(plural),
            "\n".join(draft.comments),
            draft.line,
            draft.fuzzy,
            "msgctxt" in draft.fields,
        )

    def _text(self, strings: list[str]) -> str:
        if not any("\\" in string for string in strings):
            return "".join(strings)
        if not any(_BYTE_ESCAPE.search(string) for string in strings):
            return _ESCAPE.sub(_simple_escape, "".join(strings))
        try:
            return b"".join(_as_bytes(s, self._charset) for s in strings).decode(self._charset)
        except UnicodeError as error:
            raise self._error(
                f"the bytes of an escape are not {self._charset}, the charset of its header"
            ) from error

    def _syntax_error(self, found: str) -> DataError:
        return self._error(
            f"found {found.strip()[:50]!r}, expected msgid, msgstr, a comment or a quoted string"
        )

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self._name}, line {self._number}: {problem}")


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text, which end in LF, or in CR where there is no LF."""
    end, at = "\n" if "\n" in text else "\r", 0
    while (found := text.find(end, at)) >= 0:
        yield text[at:found]
        at = found + 1
    yield text[at:]


def _simple_escape(match: re.Match[str]) -> str:
    return _SIMPLE.get(match["char"], match[0])


def _as_bytes(string: str, charset: str) -> bytes:
    found, at = bytearray(), 0
    for match in _ESCAPE.finditer(string):
        found += string[at : match.start()].encode(charset)
        at = match.end()
        if match["octal"]:
            found.append(int(match["octal"], 8) & 0xFF)
        elif match["hex"]:
            found.append(int(match["hex"][-2:], 16))
        else:
            found += _simple_escape(match).encode(charset)
    return bytes(found + string[at:].encode(charset))
