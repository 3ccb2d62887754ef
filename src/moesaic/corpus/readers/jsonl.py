"""JSONL files: one object per line, in the common shapes.

``{"src": ..., "tgt": ..., "src_lang": ..., "tgt_lang": ...}``, Hugging Face's
``{"translation": {"en": ..., "de": ...}}``, and ``{"text": ...}`` for one language.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.readers.text_lines import read_lines

_PAIR_KEYS = (("src", "tgt"), ("source", "target"))


def read_jsonl_pairs(path: Path, *, source: str = "", target: str = "") -> Iterator[Pair]:
    """Yield pairs. ``source`` and ``target`` (codes) are used where a line has no languages.

    Raises DataError with file and line for any other object, or an unknown language.
    """
    for number, value in _objects(path):
        where = f"{path}, line {number}"
        if "translation" in value:
            yield _translation(value["translation"], source=source, target=target, where=where)
            continue
        keys = next((k for k in _PAIR_KEYS if k[0] in value and k[1] in value), None)
        if keys is None:
            raise DataError(
                f'{where}: found keys {", ".join(value)}, expected "src" and "tgt", or '
                '"translation": {"en": ..., "de": ...}'
            )
        yield Pair(
            _text(value[keys[0]], where=where),
            _text(value[keys[1]], where=where),
            _code(value.get("src_lang"), default=source, key="src_lang", where=where),
            _code(value.get("tgt_lang"), default=target, key="tgt_lang", where=where),
        )


def read_jsonl_texts(path: Path, *, code: str) -> Iterator[Text]:
    """Yield the ``text`` of every line."""
    for number, value in _objects(path):
        where = f"{path}, line {number}"
        if "text" not in value:
            raise DataError(f'{where}: found keys {", ".join(value)}, expected "text"')
        yield Text(_text(value["text"], where=where), code)


def _objects(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: found {line[:40]!r}, expected an object")
        yield number, value


def _translation(value: object, *, source: str, target: str, where: str) -> Pair:
    if not isinstance(value, dict) or len(value) < 2:
        raise DataError(f'{where}: "translation" must map two languages to texts, found {value!r}')
    texts = {_code(k, default="", key="translation", where=where): v for k, v in value.items()}
    first, second, *_ = texts
    codes = source or first, target or second
    for code in codes:
        if code not in texts:
            raise DataError(f"{where}: no {code} among {', '.join(texts)}")
    sides = [_text(texts[c], where=where) for c in codes]
    return Pair(sides[0], sides[1], *codes)


def _text(value: object, *, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: found {value!r}, expected a text")
    return value


def _code(value: object, *, default: str, key: str, where: str) -> str:
    if value is None and default:
        return default
    if not isinstance(value, str):
        raise DataError(f"{where}: no language: give {key} in the line, or for the file")
    try:
        return resolve_language(value).code
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
