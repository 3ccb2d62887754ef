"""TMX: translation memories (TMX 1.4), read as a stream; inline codes are left out of the text."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair
from moesaic.corpus.readers.text_lines import open_bytes

_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_CODES = ("bpt", "ept", "ph", "it", "ut")  # what they hold is markup of the original format


def read_tmx(path: Path, *, source: str, target: str) -> Iterator[Pair]:
    """Yield the units that have both languages (codes); the others are passed over.

    Raises DataError: no XML, cut short, or no unit with these languages (those found are named).
    """
    seen: set[str] = set()
    matched = False
    for unit in _units(path):
        texts = _texts(unit, where=str(path))
        seen |= set(texts)
        if source in texts and target in texts:
            matched = True
            yield Pair(texts[source], texts[target], source, target)
    if not matched:
        found = f"its languages are {', '.join(sorted(seen))}" if seen else "it has no units"
        raise DataError(f"{path}: no unit with both {source} and {target}: {found}")


def _units(path: Path) -> Iterator[ET.Element]:
    with open_bytes(path) as stream:
        try:
            events = ET.iterparse(stream, events=("start", "end"))
            _, root = next(events, ("", ET.Element("nothing")))
            if root.tag != "tmx":
                raise DataError(f"{path}: found <{root.tag}>, expected a <tmx> file")
            body = root
            for event, element in events:
                if event == "start" and element.tag == "body":
                    body = element
                elif event == "end" and element.tag == "tu":
                    yield element
                    body.clear()  # the tree must not grow with the file
        except ET.ParseError as error:
            raise DataError(f"{path}: not well-formed XML, perhaps cut short: {error}") from error


def _texts(unit: ET.Element, *, where: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for variant in unit.iter("tuv"):
        spelled = variant.get(_XML_LANG) or variant.get("lang") or ""
        segment = variant.find("seg")
        if segment is None:
            continue
        try:
            texts.setdefault(resolve_language(spelled).code, "".join(_plain(segment)).strip())
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return texts


def _plain(element: ET.Element) -> Iterator[str]:
    if element.tag not in _CODES:
        yield element.text or ""
        for child in element:
            yield from _plain(child)
            yield child.tail or ""
