"""Units: a checkpoint's tensors one after the other, a bank expert by expert, never two at once."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.checkpoint.index import Stored
from moesaic.checkpoint.reader import Reader
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class Unit:
    """A tensor, or one expert of a bank (without the bank's first dim)."""

    label: str
    data: Tensor
    expert: int | None = None


def units(reader: Reader, *, label: str, stored: Stored, experts: int = 0) -> Iterator[Unit]:
    """Yield a tensor, or its experts; ``experts`` splits one that does not know it is a bank."""
    count = stored.experts or experts
    if not count:
        yield Unit(label, reader.tensor(stored))
    for expert in range(count):
        yield Unit(expert_label(label, expert), reader.expert(stored, expert), expert)


def expert_label(label: str, expert: int) -> str:
    """Return how an expert of a bank is named everywhere."""
    return f"{label}/expert-{expert:04d}"
