"""JSONL files: one object per line, in the common shapes.

``{"src": ..., "tgt": ..., "src_lang": ..., "tgt_lang": ...}`` (also ``source`` and ``target``, and
``source_lang`` or ``source_language``), Hugging Face's
``{"translation": {"en": ..., "de": ...}}``, and ``{"text": ...}`` for one language.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moesaic.core.errors import DataError
from moesaic.corpus.languages import find_language, resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.text_lines import read_lines, replace_lone_surrogates
from moesaic.corpus.readers.variants import WantedLanguage

_PAIR_KEYS = (("src", "tgt"), ("source", "target"))
_LANGUAGE_KEYS = ("{}_lang", "{}_language", "{}Lang", "{}Language")
# also one that does not end: to look for its end from each quote anew takes quadratic time
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")
_SHOWN = 60

Wanted = WantedLanguage | None


def read_jsonl_pairs(path: Path, source: Wanted, target: Wanted) -> Iterator[Pair]:
    """Yield pairs. ``source`` and ``target`` are used where a line has no languages.

    With both given, the other languages of a line are left out, unknown ones too. Without them the
    first line's order of languages is the direction of all. Raises DataError with file and line for
    any other object, or an unknown language.
    """
    chooser, other_languages, matched = _SideChooser(source, target), "", False
    for number, value in read_objects(path):
        where = f"{path}, line {number}"
        if "translation" in value:
            texts = _translation_texts(value["translation"], where=where)
            pair = chooser.choose(texts, where=where)
            if pair is None:
                other_languages = other_languages or f"{where}: its languages are {_names(texts)}"
                continue
            matched = True
            yield pair
            continue
        keys = next((k for k in _PAIR_KEYS if k[0] in value and k[1] in value), None)
        if keys is None:
            raise DataError(
                f'{where}: found keys {_names(value)}, expected "src" and "tgt", or '
                '"translation": {"en": ..., "de": ...}'
            )
        codes = [
            _line_language(value, default=default, other=other, side=side, where=where)
            for side, default, other in (("src", source, target), ("tgt", target, source))
        ]
        if all(codes):
            matched = True
            left, right = (_text(value[key], where=where) for key in keys)
            yield Pair(left, right, codes[0], codes[1])
    if other_languages and not matched and source and target:
        raise DataError(f"{other_languages}, expected {source.code} and {target.code}")


def read_jsonl_texts(path: Path, *, code: str) -> Iterator[Text]:
    """Yield the ``text`` of every line."""
    for number, value in read_objects(path):
        where = f"{path}, line {number}"
        if "text" not in value:
            raise DataError(f'{where}: found keys {_names(value)}, expected "text"')
        yield Text(_text(value["text"], where=where), code)


def read_objects(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (line number from 1, JSON object) of a .jsonl file, blank lines left out.

    Raises DataError with file and line: no valid JSON, no object, nested too deeply.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        _check_nesting(line, where=where)
        try:
            value = json.loads(line, object_pairs_hook=_without_duplicates)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: found {line[:40]!r}, expected an object")
        yield number, value


def _check_nesting(line: str, *, where: str) -> None:
    """Refuse a line that is nested too deeply for the JSON parser, which is recursive."""
    if line.count("[") + line.count("{") <= limits.MAX_NESTING:
        return
    depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub("", line)):
        depth += 1 if bracket in "[{" else -1
        if depth > limits.MAX_NESTING:
            raise DataError(
                f"{where}: nested deeper than {limits.MAX_NESTING}, the limit; expected one flat "
                "object per line"
            )


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f'the key "{key[:_SHOWN]}" is there twice')
    return found


def _translation_texts(value: object, *, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict) or len(value) < 2:
        raise DataError(
            f'{where}: "translation" must map two languages to texts, found {_shown(value)}'
        )
    return value


class _SideChooser:
    """Chooses source and target among the languages of ``translation`` objects."""

    def __init__(self, source: Wanted, target: Wanted) -> None:
        self._source, self._target = source, target
        self._directions: dict[frozenset[str], tuple[str, ...]] = {}

    def choose(self, texts: Mapping[str, object], *, where: str) -> Pair | None:
        """Return the pair, or None where one of the languages asked for is missing."""
        source, target = self._source, self._target
        if source is None or target is None:
            source, target = self._undecided(texts, where=where)
        left, right = source.select(texts.items()), target.select(texts.items())
        if not left or not right:
            return None
        sides = [_text(found[0], where=where) for found in (left, right)]
        return Pair(sides[0], sides[1], source.code, target.code)

    def _undecided(
        self, texts: Mapping[str, object], *, where: str
    ) -> tuple[WantedLanguage, WantedLanguage]:
        """Return the two languages where one or none is given: there may be only two."""
        found = (find_language(tag) for tag, text in texts.items() if isinstance(text, str))
        codes = tuple(dict.fromkeys(language.code for language in found if language))
        codes = self._directions.setdefault(frozenset(codes), codes)
        given = [side.code for side in (self._source, self._target) if side]
        others = [code for code in codes if code not in given]
        if len(others) + len(given) != 2:
            raise DataError(
                f"{where}: its languages are {_names(texts)}: give source and target for the file"
            )
        source = self._source or WantedLanguage.resolve(others.pop(0))
        return source, self._target or WantedLanguage.resolve(others.pop(0))


def _line_language(
    line: Mapping[str, object], *, default: Wanted, other: Wanted, side: str, where: str
) -> str:
    """Return the code of a line's language; an empty string for an unknown one nobody asked for."""
    long = {"src": "source", "tgt": "target"}[side]
    keys = [form.format(name) for form in _LANGUAGE_KEYS for name in (side, long)]
    value = next((line[key] for key in keys if line.get(key) is not None), None)
    if value is None and default is not None:
        return default.code
    if not isinstance(value, str):
        raise DataError(f"{where}: no language: give {side}_lang in the line, or for the file")
    found = find_language(value)
    if found is None and not (default and other):
        try:
            return resolve_language(value).code
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return found.code if found is not None else ""


def _text(value: object, *, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: found {_shown(value)}, expected a text")
    return replace_lone_surrogates(value)


def _shown(value: object) -> str:
    """Return a value as an error message shows it: never the whole of a large one."""
    if isinstance(value, str | int | float | None):
        return repr(value)[:_SHOWN]
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else "?"


def _names(value: Mapping[str, object]) -> str:
    names = ", ".join(key[:_SHOWN] for key in list(value)[:10])
    return names + (", ..." if len(value) > 10 else "")
