"""Translation memories (TMX 1.1 to 1.4), streamed with lxml; no tree is built.

Of a segment the text is taken. Inline codes are left out, but words on both sides of one stay
apart, and a code that is a placeholder (``{0}``, ``%s``) stays as text.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from moesaic.core.errors import DataError
from moesaic.corpus.languages import find_language
from moesaic.corpus.markup import is_block_tag, is_inline_tag
from moesaic.corpus.pair import Pair
from moesaic.corpus.placeholders import find_placeholders
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.compressed import open_bytes
from moesaic.corpus.readers.variants import WantedLanguage

_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_CODES = ("bpt", "ept", "ph", "it", "ut")  # their content is markup of the original format
_VALUES = ("printf", "placeholder", "complex")  # placeholders that a program replaces
_STANDALONE = ("ph", "ut")  # the others begin or end a format, often within a word
_BLOCK = 1 << 16
_GAP = "\0"  # an inline code; XML has no NUL
_SHOWN, _LONGEST = 20, 200  # names in a list and characters of each, characters of an error
# no space before closing and after opening punctuation
_BETWEEN_WORDS = re.compile(r"(?<=[^\s\0(\[{«¿¡“‘])\0+(?=[^\s\0)\]}».,;:!?…’”、。])")


def read_tmx(path: Path, *, source: WantedLanguage, target: WantedLanguage) -> Iterator[Pair]:
    """Yield the units that have both languages; an exact tag (``de-DE``) wins over a reduced one.

    Of several texts under the same tag each is a pair. Raises DataError: not XML, cut short, nested
    deeper than ``MAX_NESTING``, more than ``MAX_UNIT_BYTES`` without the end of a unit, or no
    unit with these languages (those found are listed).
    """
    seen: dict[str, None] = {}
    matched = False
    for unit in _units(path):
        sources, targets = source.select(unit), target.select(unit)
        if sources and targets:
            matched = True
            for left, right in _combined(sources, targets):
                yield Pair(left, right, source.code, target.code)
        elif not matched and len(seen) <= _SHOWN:
            seen |= dict.fromkeys(_named(tag) for tag, _ in unit)
    if not matched:
        found = f"its languages are {_listed(sorted(seen))}" if seen else "it has no units"
        raise DataError(f"{path}: no unit with both {source.code} and {target.code}: {found}")


def _combined(sources: list[str], targets: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the first of each side with each of the other; all combinations would be n * m."""
    yield from ((sources[0], target) for target in targets)
    yield from ((source, targets[0]) for source in sources[1:])


def _named(tag: str) -> str:
    language = find_language(tag)
    return language.code if language else tag[:_SHOWN] or "(none given)"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _units(path: Path) -> Iterator[list[tuple[str, str]]]:
    """Yield (tag, text) of the variants of each unit."""
    collector = _UnitCollector(str(path))
    # nothing outside the file is read, and no entity is expanded
    parser = etree.XMLParser(
        target=collector,
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
    )
    try:
        with open_bytes(path) as stream:
            since_unit = 0
            while block := stream.read(_BLOCK):
                parser.feed(block)
                _refuse_undefined_entities(parser.feed_error_log, path=path)
                collector.lines += block.count(b"\n")
                since_unit = 0 if collector.units else since_unit + len(block)
                if since_unit > limits.MAX_UNIT_BYTES:
                    raise DataError(
                        f"{path}, near line {collector.lines + 1}: more than "
                        f"{limits.as_size(limits.MAX_UNIT_BYTES)} without the end of a <tu>, the "
                        "limit of a header or unit; remove all but units, or check that this is a "
                        "translation memory"
                    )
                yield from collector.take_units()
            parser.close()
        yield from collector.take_units()
    except etree.XMLSyntaxError as error:
        raise DataError(
            f"{path}: not well-formed XML, perhaps cut short: {str(error)[:_LONGEST]}"
        ) from error


def _refuse_undefined_entities(log: Iterable[Any], *, path: Path) -> None:
    """Raise DataError where the parser left out an entity, as it does beside an external DTD."""
    for entry in log:
        if entry.type_name == "WAR_UNDECLARED_ENTITY":
            raise DataError(
                f"{path}, line {entry.line}: {entry.message[:_LONGEST]} in this file, so its text "
                "is unknown; write the character itself, or define the entity in the DOCTYPE"
            )


@dataclass(slots=True)
class _UnitCollector:
    """The target of the XML parser: keeps the texts of the unit that is being read."""

    name: str
    units: list[list[tuple[str, str]]] = field(default_factory=list)
    lines: int = 0  # of the file that are read
    _open: list[str] = field(default_factory=list)  # the elements around the next text
    _variants: list[tuple[str, str]] = field(default_factory=list)
    _tag: str = ""
    _text: list[str] | None = None  # of the open segment
    _code: list[str] | None = None  # the content of the open inline code

    def take_units(self) -> list[list[tuple[str, str]]]:
        """Return the units that were completed since the last call."""
        taken, self.units = self.units, []
        return taken

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = etree.QName(tag).localname
        if not self._open and name != "tmx":
            raise DataError(f"{self.name}: found <{name[:_SHOWN]}>, expected a <tmx> file")
        self._open.append(name)
        if len(self._open) > limits.MAX_NESTING:
            raise DataError(
                f"{self.name}, after line {self.lines}: elements nested deeper than "
                f"{limits.MAX_NESTING}, the limit; the file is damaged, or no translation memory"
            )
        if name == "tu":
            self._variants = []
        elif name == "tuv":
            self._tag = attributes.get(_XML_LANG) or attributes.get("lang") or ""
        elif name == "seg":
            self._text, self._code = [], None
        elif name in _CODES and self._code is None:
            self._code = []

    def data(self, text: str) -> None:
        if self._code is not None:
            self._code.append(text)
        elif self._text is not None:
            self._text.append(text)

    def end(self, tag: str) -> None:  # noqa: ARG002
        name = self._open.pop()
        if name in _CODES and self._code is not None and not _is_within_code(self._open):
            code, self._code = "".join(self._code), None
            if self._text is not None:
                self._text.append(_shown(code, element=name))
        elif name == "seg" and self._text is not None:
            self._variants.append((self._tag, _joined(self._text)))
            self._text = None
        elif name == "tuv":
            self._tag = ""
        elif name == "tu":
            self.units.append(self._variants)
            self._variants = []

    def close(self) -> None:
        """Called by the parser at the end of the file."""


def _is_within_code(names: list[str]) -> bool:
    return any(name in _CODES for name in names)


def _shown(code: str, *, element: str) -> str:
    """Return what stays of an inline code: its placeholder, a gap between words, or nothing."""
    content = code.strip()
    found = find_placeholders(content)
    if len(found) == 1 and found[0].text == content and found[0].kind in _VALUES:
        return content
    if is_block_tag(content) or (element in _STANDALONE and not is_inline_tag(content)):
        return _GAP
    return ""


def _joined(parts: list[str]) -> str:
    text = "".join(parts)
    return _BETWEEN_WORDS.sub(" ", text).replace(_GAP, "").strip() if _GAP in text else text.strip()
