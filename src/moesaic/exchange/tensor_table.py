"""Tensor table: which values of our tensors are which of theirs, by name, in both directions.

A rule belongs to a name of ours and returns pieces, each a region of our tensor that equals a
region of one of theirs, perhaps transposed. Reading a table backwards is exchanging the two.

Letters: E experts, D model dim, F hidden width (2F before a gated activation).
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from moesaic.core.errors import CheckpointError
from moesaic.model.weights import export_weights
from moesaic.nn.fused_projections import fused_outputs

Shape = tuple[int, ...]
_FIELD = re.compile(r"\\\{(\w+)\\\}")


@dataclass(frozen=True, slots=True)
class Region:
    """A box of the tensor ``name``: its first value and its shape."""

    name: str
    offset: Shape
    shape: Shape

    @property
    def end(self) -> Shape:
        return tuple(first + size for first, size in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Two regions with the same values, the last two dims of one exchanged where ``transposed``.

    Row i of the target is row ``order[i]`` of the source, if there is an order; ``dim`` has the
    rows.
    """

    target: Region
    source: Region
    transposed: bool = False
    order: tuple[int, ...] | None = None
    dim: int = 0

    def reversed(self) -> "TensorPiece":
        """Return the piece of the other direction."""
        order = self.order and tuple(sorted(range(len(self.order)), key=self.order.__getitem__))
        return replace(self, target=self.source, source=self.target, order=order)


@dataclass(frozen=True, slots=True)
class OurTensor:
    """A tensor of a model: name, shape, and the widths of the maps that are fused in it."""

    name: str
    shape: Shape
    widths: Shape


class TensorRule(ABC):
    """Family of the ways in which a tensor of ours is stored in a foreign checkpoint."""

    @abstractmethod
    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        """Yield the pieces of a tensor; ``layer`` is the number of its block."""


class Rows(TensorRule):
    """Whole tensors of theirs, one after the other along the first dim (q, k and v)."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        rest, start = ours.shape[1:], 0
        widths = ours.widths if len(self.names) > 1 else ours.shape[:1]
        for name, width in zip(self.names, widths, strict=True):
            inside = Region(ours.name, (start, *_zeros(rest)), (width, *rest))
            yield TensorPiece(inside, _whole(_in_layer(name, layer), inside.shape))
            start += width


class RowVector(TensorRule):
    """A vector that theirs has as a matrix of one row."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        inside = Region(ours.name, (0,), ours.shape)
        yield TensorPiece(inside, _whole(_in_layer(self.name, layer), (1, *ours.shape)))


class GatedRows(TensorRule):
    """One tensor of theirs, or two (gate, value) where our activation is gated."""

    def __init__(self, plain: str, gate: str, value: str) -> None:
        self._plain, self._gated = Rows(plain), Rows(gate, value)

    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        yield from (self._gated if len(ours.widths) > 1 else self._plain).pieces(ours, layer=layer)


class ExpertVectors(TensorRule):
    """A vector [F] for each expert, ``{expert}`` in the name: ours is [E, F]."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        experts, width = ours.shape
        for expert in range(experts):
            theirs = _in_layer(self.name, layer).replace("{expert}", str(expert))
            yield TensorPiece(Region(ours.name, (expert, 0), (1, width)), _whole(theirs, (width,)))


def _matrices_of_maps(ours: OurTensor, names: tuple[str, ...]) -> Iterator[tuple[int, str, Region]]:
    """Yield the columns of each map of each expert in a bank [E, D, F], with the map's name."""
    experts, rows, columns = ours.shape
    widths = ours.widths if len(names) > 1 else (columns,)
    for expert in range(experts):
        start = 0
        for name, width in zip(names, widths, strict=True):
            yield expert, name, Region(ours.name, (expert, 0, start), (1, rows, width))
            start += width


class ExpertMatrices(TensorRule):
    """A matrix [F, D] for each expert and map, ``{expert}`` in the name: ours is [E, D, F]."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        for expert, name, inside in _matrices_of_maps(ours, self.names):
            theirs = _in_layer(name, layer).replace("{expert}", str(expert))
            _, rows, width = inside.shape
            yield TensorPiece(inside, _whole(theirs, (width, rows)), transposed=True)


class FusedExperts(TensorRule):
    """A tensor [E, F, D] of all experts for each map; one name: gate before value in one tensor.

    Ours is [E, D, F].
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        for expert, name, inside in _matrices_of_maps(ours, self.names):
            _, rows, width = inside.shape
            theirs = Region(_in_layer(name, layer), (expert, 0, 0), (1, width, rows))
            yield TensorPiece(inside, theirs, transposed=True)


class InterleavedExperts(TensorRule):
    """One tensor [E, *, 2F] whose last channels are gate, value, gate, ...: ours is gates first."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pieces(self, ours: OurTensor, *, layer: str) -> Iterator[TensorPiece]:
        experts, *rest = ours.shape
        order = (*range(0, rest[-1], 2), *range(1, rest[-1], 2))
        for expert in range(experts):
            inside = Region(ours.name, (expert, *_zeros(rest)), (1, *rest))
            theirs = replace(inside, name=_in_layer(self.name, layer))
            yield TensorPiece(inside, theirs, order=order, dim=len(rest))


TensorTable = Mapping[str, TensorRule]


def our_tensors(model: nn.Module) -> dict[str, OurTensor]:
    """Return the tensors of a whole model, which may be on the meta device, by name."""
    fused = fused_outputs(model)
    biases = {name.removesuffix("weight") + "bias": widths for name, widths in fused.items()}
    return {
        name: OurTensor(name, tuple(tensor.shape), (fused | biases).get(name, ()))
        for name, tensor in export_weights(model).items()
    }


def match_tensors(tensors: Mapping[str, OurTensor], table: TensorTable) -> list[TensorPiece]:
    """Return the pieces of all tensors of a model; ours are the targets.

    Raises CheckpointError for a tensor that the table has no rule for.
    """
    rules = [(_pattern(name), rule) for name, rule in table.items()]
    pieces: list[TensorPiece] = []
    for name, tensor in tensors.items():
        found = next(((m, rule) for pattern, rule in rules if (m := pattern.fullmatch(name))), None)
        if found is None:
            raise CheckpointError(f"{name}: this family of models has no such tensor")
        match, rule = found
        pieces += rule.pieces(tensor, layer=match.groupdict().get("layer", ""))
    return pieces


def source_shapes(pieces: Sequence[TensorPiece]) -> dict[str, Shape]:
    """Return the shape of each tensor that pieces are read from, if they cover it."""
    shapes: dict[str, Shape] = {}
    for piece in pieces:
        name, end = piece.source.name, piece.source.end
        shapes[name] = tuple(map(max, shapes.get(name, end), end))
    return shapes


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(_FIELD.sub(r"(?P<\1>\\d+)", re.escape(name)))


def _in_layer(name: str, layer: str) -> str:
    return name.replace("{layer}", layer)


def _zeros(shape: Sequence[int]) -> Shape:
    return (0,) * len(shape)


def _whole(name: str, shape: Shape) -> Region:
    return Region(name, _zeros(shape), shape)
