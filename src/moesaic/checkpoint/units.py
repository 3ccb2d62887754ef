"""Units: a checkpoint's tensors one after the other, a bank expert by expert, never two at once."""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.checkpoint.index import StoredTensor
from moesaic.checkpoint.reader import TensorReader
from moesaic.core.shapes import Tensor


@dataclass(frozen=True, slots=True)
class LoadedTensor:
    """A tensor, or one expert of a bank (without the bank's first dim)."""

    label: str
    data: Tensor
    expert: int | None = None


def read_by_expert(reader: TensorReader, *, label: str, stored: StoredTensor, num_experts: int = 0) -> Iterator[LoadedTensor]:
    """Yield a tensor, or its experts; ``experts`` splits one that does not know it is a bank."""
    count = stored.num_experts or num_experts
    if not count:
        yield LoadedTensor(label, reader.read_tensor(stored))
    for expert in range(count):
        yield LoadedTensor(expert_label(label, expert), reader.read_expert(stored, expert), expert)


def expert_label(label: str, expert: int) -> str:
    """Return how an expert of a bank is named everywhere."""
    return f"{label}/expert-{expert:04d}"
