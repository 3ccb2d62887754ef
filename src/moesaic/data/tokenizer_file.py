"""The file of a tokenizer, checked before the library reads it.

The tokenizers library follows every setting of ``tokenizer.json``: a padding of 10^8 tokens is
allocated for each text, a truncation cuts texts without a word, dropout makes encoding random, and
an id beyond the vocabulary has no row in the embedding. moesaic writes none of these.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.config_errors import show_value
from moesaic.core.errors import DataError
from moesaic.core.file_reader import (
    MIB,
    Count,
    FileKind,
    FileShape,
    decode_text,
    parse_shape,
    read_bytes,
)

TOKENIZER_FILE = FileKind(
    name="tokenizer.json that can be read",
    max_bytes=256 * MIB,
    max_values=20_000_000,
    error=DataError,
)
UNUSED_SETTINGS = ("truncation", "padding", "post_processor")
UNUSED_MODEL_SETTINGS = (
    "model.dropout",
    "model.continuing_subword_prefix",
    "model.end_of_word_suffix",
)


class _AddedToken(FileShape):
    id: Count
    content: str


class _TokenizerShape(FileShape):
    kind: ClassVar[FileKind] = TOKENIZER_FILE
    truncation: Any = None
    padding: Any = None
    post_processor: Any = None
    added_tokens: tuple[_AddedToken, ...] = ()
    model: dict[str, Any]


def read_tokenizer_file(path: Path) -> HfTokenizer:
    """Read a tokenizer.json that changes no text. Raises DataError naming file and setting."""
    data = _checked_bytes(path, unused=(*UNUSED_SETTINGS, *UNUSED_MODEL_SETTINGS))
    hf_tokenizer = _parse(decode_text(data, kind=TOKENIZER_FILE, where=path), path=path)
    _require_dense_ids(hf_tokenizer, path)
    return hf_tokenizer


def read_imported_tokenizer_file(path: Path) -> HfTokenizer:
    """Read the tokenizer.json of a run that was imported from elsewhere.

    It may mark parts of words, and leave ids without a token. Raises DataError.
    """
    data = _checked_bytes(path, unused=(*UNUSED_SETTINGS, "model.dropout"))
    return _parse(decode_text(data, kind=TOKENIZER_FILE, where=path), path=path)


def import_tokenizer_file(path: Path) -> tuple[HfTokenizer, list[str]]:
    """Read any tokenizer.json, without the settings that would change or add tokens.

    Returns it with a note on each setting that was left out. Raises DataError.
    """
    data = _checked_bytes(path, unused=())
    tree = json.loads(data)
    left_out = [name for name in UNUSED_SETTINGS if tree.get(name) is not None]
    tree |= dict.fromkeys(UNUSED_SETTINGS)
    if tree["model"].get("dropout") is not None:
        left_out.append("model.dropout")
        tree["model"]["dropout"] = None
    notes = [
        f"{path.name}: its {name} is left out (special tokens, lengths and padding are those of "
        "the run)"
        for name in left_out
    ]
    return _parse(json.dumps(tree, ensure_ascii=False), path=path), notes


def _checked_bytes(path: Path, *, unused: Sequence[str]) -> bytes:
    """Return the content of a file of the right shape, without the settings ``unused``."""
    data = read_bytes(path, TOKENIZER_FILE)
    shape = parse_shape(data, _TokenizerShape, kind=TOKENIZER_FILE, where=path)
    settings = {name: getattr(shape, name) for name in UNUSED_SETTINGS}
    settings |= {name: shape.model.get(name.partition(".")[2]) for name in UNUSED_MODEL_SETTINGS}
    for name in unused:
        if (value := settings[name]) is not None:
            found = f"{name}: found {show_value(value)}, expected null"
            raise TOKENIZER_FILE.problem(path, f"{found}: it would change what is encoded")
    return data


def _parse(text: str, *, path: Path) -> HfTokenizer:
    try:
        return HfTokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception, and a panic of the library, which is none
        problem = f"not a {TOKENIZER_FILE.name} ({error})"
        raise TOKENIZER_FILE.problem(path, problem) from error


def _require_dense_ids(hf_tokenizer: HfTokenizer, path: Path) -> None:
    vocabulary = hf_tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= len(vocabulary) or len(set(vocabulary.values())) < len(vocabulary):
        expected = f"expected each id from 0 to {len(vocabulary) - 1} once"
        found = f"its {len(vocabulary)} tokens have ids up to {largest}"
        raise TOKENIZER_FILE.problem(path, f"{found}, {expected}")
