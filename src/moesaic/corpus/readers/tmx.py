"""Translation memories (TMX 1.4), streamed with lxml; inline codes are left out of the text."""

from collections.abc import Iterator
from pathlib import Path

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair
from moesaic.corpus.readers.text_lines import open_bytes

_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_CODES = ("bpt", "ept", "ph", "it", "ut")  # their content is markup of the original format


def read_tmx(path: Path, *, source: str, target: str) -> Iterator[Pair]:
    """Yield the units that have both languages (codes).

    Raises DataError: not XML, cut short, or no unit with these languages (those found are listed).
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


def _units(path: Path) -> Iterator[etree._Element]:
    with open_bytes(path) as stream:
        # nothing outside the file is read, and no entity is expanded
        units = etree.iterparse(
            stream,
            tag="tu",
            resolve_entities=False,
            no_network=True,
            load_dtd=False,
            huge_tree=False,
        )
        try:
            for _, unit in units:
                yield unit
                _remove_read(unit)
        except etree.XMLSyntaxError as error:
            raise DataError(f"{path}: not well-formed XML, perhaps cut short: {error}") from error
        if units.root.tag != "tmx":
            raise DataError(f"{path}: found <{units.root.tag}>, expected a <tmx> file")


def _remove_read(unit: etree._Element) -> None:
    """Remove a unit's content and the units before it: the tree must not grow with the file."""
    unit.clear()
    while unit.getprevious() is not None:
        del unit.getparent()[0]


def _texts(unit: etree._Element, *, where: str) -> dict[str, str]:
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


def _plain(element: etree._Element) -> Iterator[str]:
    if element.tag not in _CODES:
        yield element.text or ""
        for child in element:
            yield from _plain(child)
            yield child.tail or ""
