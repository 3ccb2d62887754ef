"""The file of a tokenizer, checked before the library reads it.

The tokenizers library follows every setting of ``tokenizer.json``: a padding of 10^8 tokens is
allocated for each text, a truncation cuts texts without a word, dropout makes encoding random, and
an id beyond the vocabulary has no row in the embedding. moesaic writes none of these.
"""

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
UNUSED_MODEL_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


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
    data = read_bytes(path, TOKENIZER_FILE)
    shape = parse_shape(data, _TokenizerShape, kind=TOKENIZER_FILE, where=path)
    settings = {name: getattr(shape, name) for name in UNUSED_SETTINGS}
    settings |= {f"model.{name}": shape.model.get(name) for name in UNUSED_MODEL_SETTINGS}
    for name, value in settings.items():
        if value is not None:
            found = f"{name}: found {show_value(value)}, expected null"
            raise TOKENIZER_FILE.problem(path, f"{found}: it would change what is encoded")
    try:
        hf_tokenizer = HfTokenizer.from_str(decode_text(data, kind=TOKENIZER_FILE, where=path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception, and a panic of the library, which is none
        problem = f"not a {TOKENIZER_FILE.name} ({error})"
        raise TOKENIZER_FILE.problem(path, problem) from error
    _require_dense_ids(hf_tokenizer, path)
    return hf_tokenizer


def _require_dense_ids(hf_tokenizer: HfTokenizer, path: Path) -> None:
    vocabulary = hf_tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= len(vocabulary) or len(set(vocabulary.values())) < len(vocabulary):
        expected = f"expected each id from 0 to {len(vocabulary) - 1} once"
        found = f"its {len(vocabulary)} tokens have ids up to {largest}"
        raise TOKENIZER_FILE.problem(path, f"{found}, {expected}")
