"""New rows of embedding tables: how a warm start with a larger vocabulary begins them.

The rows of the first run keep their values, so the logits of its ids are unchanged.

Letters: V rows, D model dim.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moesaic.checkpoint.snapshot import Shard, ShardBlock
from moesaic.checkpoint.stored_weights import StoredWeights
from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.corpus.languages import resolve_language
from moesaic.data.tokenizer import Tokenizer
from moesaic.nn.initializer import Distribution, draw_block, parameter_key

ROWS_AT_ONCE = 8192
TABLES = ("embedding.weight", "embedding.output")


class NewRows(Choice):
    """Family: the values of the rows that a larger vocabulary adds to a table."""

    def row(
        self, stored: StoredWeights, name: str, *, tokenizer: Path
    ) -> Float[Tensor, "D"] | None:
        """Return the value of every new row of a table, given what the first run has stored.

        None: they are drawn, as the run would have drawn them without a first run. No more than
        ``ROWS_AT_ONCE`` rows of the table are in memory.
        """
        raise NotImplementedError


class DrawnRows(NewRows):
    """Drawn at random from the distribution of the table (``model.init``)."""

    def row(self, stored: StoredWeights, name: str, *, tokenizer: Path) -> None:
        del stored, name, tokenizer


class MeanOfRows(NewRows):
    """The mean of the rows that there are."""

    def row(self, stored: StoredWeights, name: str, *, tokenizer: Path) -> Float[Tensor, "D"]:
        del tokenizer
        rows, dim = stored.shapes[name]
        total = torch.zeros(dim, dtype=torch.float64)  # the sum of as many rows as there are
        for first in range(0, rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, rows - first)
            total += _stored_rows(stored, name, first=first, count=count).sum(0, dtype=total.dtype)
        return (total / rows).float()


class CopyOfLanguage(NewRows):
    """The row of the tag of ``language``, one that is related. Raises DataError without a tag."""

    language: str

    def row(self, stored: StoredWeights, name: str, *, tokenizer: Path) -> Float[Tensor, "D"]:
        code = resolve_language(self.language).code
        tag = Tokenizer.load(tokenizer).vocabulary.tag(code)
        return _stored_rows(stored, name, first=tag, count=1)[0]


def _stored_rows(
    stored: StoredWeights, name: str, *, first: int, count: int
) -> Float[Tensor, "V D"]:
    """Return some rows of a stored table, in float32, and read no others."""
    shape = stored.shapes[name]
    rows = torch.empty(count, *shape[1:])
    block = ShardBlock((first, *(0 for _ in shape[1:])), rows)
    stored.read_into({name: Shard(shape, rows.dtype, (block,))})
    return rows


def grown_tables(
    expected: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return the tables that are stored with fewer rows than expected, of the same width."""
    return [
        name
        for name in TABLES
        if name in expected
        and name in stored
        and expected[name][0] > stored[name][0]
        and tuple(expected[name][1:]) == tuple(stored[name][1:])
    ]


@torch.no_grad()
def fill_grown_table(
    shard: Shard,
    name: str,
    *,
    stored: StoredWeights,
    row: Float[Tensor, "D"] | None,
    distribution: Distribution,
    seed: int,
) -> None:
    """Fill a rank's shard of a table: the stored rows, and after them ``row`` or drawn ones."""
    rows, rest = stored.shapes[name][0], shard.shape[1:]
    for block in shard.blocks:
        first = block.offset[0]
        old = min(max(rows - first, 0), block.data.shape[0])
        if old:
            part = ShardBlock(block.offset, block.data[:old])
            stored.read_into({name: Shard((rows, *rest), shard.dtype, (part,))})
        offset, new = (first + old, *block.offset[1:]), block.data[old:]
        if row is not None:
            new.copy_(row.narrow(0, offset[1], new.shape[1]).expand_as(new))
        elif len(new):
            key = parameter_key(seed, name)
            draw_block(new, distribution, key=key, offset=offset, shape=shard.shape)
