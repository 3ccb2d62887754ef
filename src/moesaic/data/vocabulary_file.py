"""The file ``vocabulary.json``: the roles of a tokenizer that moesaic did not train.

It is beside the ``tokenizer.json`` that it belongs to::

    {"format": 1, "tokenizer": "<sha256>", "size": 32000, "roles": {"eos": 2, "pad": 1},
     "tags": {"deu_Latn": 31990}, "languages": ["deu_Latn", "eng_Latn"]}

``id_map`` is there too if the model's rows are ordered otherwise than the tokenizer's ids.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from moesaic.core.errors import DataError
from moesaic.core.file_reader import MIB, Count, FileKind, FileShape, Sha256
from moesaic.core.files import atomic_write, sha256, write_json
from moesaic.data.vocabulary import MAX_ROWS, Vocabulary

VOCABULARY_FILE = FileKind(name="record of a vocabulary", max_bytes=64 * MIB, error=DataError)
VOCABULARY_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RecordedVocabulary:
    """The roles of a foreign tokenizer, and the languages of its run (with or without tags)."""

    vocabulary: Vocabulary
    languages: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what the file says of the vocabulary, whatever tokenizer it is beside."""
        known, id_map = self.vocabulary, self.vocabulary.id_map
        return {
            "size": known.size,
            "roles": known.roles,
            "tags": dict(known.tags),
            "languages": list(self.languages),
            **({} if id_map is None else {"id_map": list(id_map)}),
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as text that is the same for equal records."""
        return json.dumps(self.to_dict(), sort_keys=True)


class _VocabularyShape(FileShape):
    kind: ClassVar[FileKind] = VOCABULARY_FILE
    format: Literal[1]  # VOCABULARY_FORMAT
    tokenizer: Sha256
    size: int = Field(ge=1, le=MAX_ROWS)
    roles: dict[Literal["pad", "bos", "eos", "unk", "mask"], Count]
    tags: dict[str, Count]
    languages: tuple[str, ...]
    id_map: tuple[Count, ...] | None = None


def vocabulary_path(tokenizer: Path) -> Path:
    """Return where the record of a tokenizer file is."""
    return tokenizer.with_name("vocabulary.json")


def read_vocabulary(tokenizer: Path) -> RecordedVocabulary | None:
    """Read the record beside a tokenizer file; None if there is none.

    Raises DataError if it is damaged, or belongs to another tokenizer.
    """
    path = vocabulary_path(tokenizer)
    if not path.is_file():
        return None
    shape = _VocabularyShape.read(path)
    if shape.tokenizer != sha256(tokenizer):
        raise VOCABULARY_FILE.problem(
            path, f"it belongs to another tokenizer than {tokenizer.name} beside it"
        )
    if "eos" not in shape.roles:
        raise VOCABULARY_FILE.problem(path, "roles: found no eos, expected one of the ids")
    try:
        found = Vocabulary.of_roles(
            shape.size,
            {str(k): v for k, v in shape.roles.items()},
            tags=shape.tags,
            id_map=shape.id_map,
        )
    except DataError as error:
        raise VOCABULARY_FILE.problem(path, str(error)) from error
    return RecordedVocabulary(found, shape.languages)


def copy_tokenizer(tokenizer: Path, *, to: Path) -> None:
    """Copy a tokenizer file, and the record of its roles if it has one."""
    atomic_write(to, tokenizer.read_bytes())
    record = vocabulary_path(tokenizer)
    vocabulary_path(to).unlink(missing_ok=True)
    if record.is_file():
        atomic_write(vocabulary_path(to), record.read_bytes())


def write_vocabulary(record: RecordedVocabulary, *, tokenizer: Path) -> None:
    """Write the record of a tokenizer file that is there already."""
    about = {"format": VOCABULARY_FORMAT, "tokenizer": sha256(tokenizer)}
    write_json(vocabulary_path(tokenizer), about | record.to_dict())
