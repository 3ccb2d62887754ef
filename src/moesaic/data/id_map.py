"""Id maps: the model's row of each id of a tokenizer's file, where the two are ordered otherwise.

Outside of the tokenizer there are rows alone: ``Vocabulary`` has those of roles and tags,
``Tokenizer.encode`` returns them and ``Tokenizer.decode`` takes them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.config_errors import show_value
from moesaic.core.errors import DataError
from moesaic.core.file_reader import MIB, FileKind, read_json
from moesaic.data.vocabulary import MAX_ROWS, require_distinct_rows

ID_MAP_FILE = FileKind(name="list of a model's rows", max_bytes=64 * MIB, error=DataError)


class IdMap(Choice):
    """Family of the orders of a model's rows."""

    def roles(self) -> dict[str, int]:
        """Return the rows that this order gives to roles, whether a token has the role or not."""
        return {}

    def rows(
        self, known: Mapping[str, int], roles: Mapping[str, str], *, in_file: int
    ) -> tuple[int, ...] | None:
        """Return the row of each id, or None where they are equal.

        Args:
            known: Id of each token, those included that the run adds behind the file's.
            roles: Token of each role.
            in_file: Number of ids of the file itself.

        Raises:
            DataError: There is no such list, or it is not one of a row for each id.
        """
        raise NotImplementedError


class SameIds(IdMap):
    """The ids of the file are the rows."""

    def rows(
        self, known: Mapping[str, int], roles: Mapping[str, str], *, in_file: int
    ) -> tuple[int, ...] | None:
        del known, roles, in_file


class FairseqIds(IdMap):
    """Fairseq's order: some roles have the first rows, all other tokens follow in the file's order.

    Of a SentencePiece model (``<unk> <s> </s>`` first) a row is the id + 1 then, and added tags
    follow its pieces: XLM-R, mBART-50 and NLLB-200. A role keeps its row if no token has it.
    """

    first: tuple[Literal["pad", "bos", "eos", "unk", "mask"], ...] = Field(
        default=("bos", "pad", "eos", "unk"), min_length=1
    )
    """Roles of the first rows, from row 0 on."""

    @model_validator(mode="after")
    def _each_role_once(self) -> "FairseqIds":
        if len(set(self.first)) < len(self.first):
            raise ValueError(f"first: found {', '.join(self.first)}, expected each role once")
        return self

    def roles(self) -> dict[str, int]:
        return {role: row for row, role in enumerate(self.first)}

    def rows(
        self, known: Mapping[str, int], roles: Mapping[str, str], *, in_file: int
    ) -> tuple[int, ...]:
        del in_file
        ahead = {known[roles[role]]: row for role, row in self.roles().items() if role in roles}
        others = iter(range(len(self.first), len(self.first) + max(known.values()) + 1))
        ids = range(max(known.values()) + 1)
        return tuple(ahead[i] if i in ahead else next(others) for i in ids)


class MappedIds(IdMap):
    """A JSON list has the row of each id, ``[3, 0, 2, ...]``; tokens beyond it get the next rows.

    For models with a dictionary of their own beside the tokenizer, such as M2M-100.
    """

    path: str

    def rows(
        self, known: Mapping[str, int], roles: Mapping[str, str], *, in_file: int
    ) -> tuple[int, ...]:
        del roles
        path, total = Path(self.path), max(known.values()) + 1
        found = read_json(path, ID_MAP_FILE)
        if not isinstance(found, list):
            raise ID_MAP_FILE.problem(path, f"found {show_value(found)}, expected a list of rows")
        if not in_file <= len(found) <= total:
            many = f"{in_file}" if in_file == total else f"{in_file} to {total}"
            problem = f"found {len(found)} rows, expected one for each id of the tokenizer: {many}"
            raise ID_MAP_FILE.problem(path, problem)
        for index, row in enumerate(found):
            if type(row) is not int or not 0 <= row < MAX_ROWS:
                problem = f"id {index} has the row {show_value(row)}, expected 0 to {MAX_ROWS - 1}"
                raise ID_MAP_FILE.problem(path, problem)
        try:
            require_distinct_rows(found)
        except DataError as error:
            raise ID_MAP_FILE.problem(path, str(error)) from error
        after = max(found, default=-1) + 1
        return (*found, *range(after, after + total - len(found)))
