"""Routes file: the routing of many batches, edge by edge, in one safetensors file.

Written atomically, batch by batch, without holding the batches in memory. Read back as ``Routing``,
exactly except for the weights, which are float16 (11 bits). ``docs/guide/routes-file.md`` specifies
the format, version 1.

Letters: T tokens of a side, N edges of a layer, B batches; all over the whole file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from moesaic.checkpoint.manifest import MAX_EXPERTS
from moesaic.checkpoint.safetensors_io import TensorHeader, read_header, write_tensors
from moesaic.core.errors import DataError, UserError, printable
from moesaic.core.file_reader import MAX_INT, MIB, Count, FileKind, FileShape, parse_shape
from moesaic.core.shapes import Tensor
from moesaic.moe.routing import Routing
from moesaic.moe.routing_record import LayerRoutes, RoutedTokens

VERSION = 1
_KEY = "moesaic_routes"
_TOKEN_COLUMNS = {
    "token": torch.int32,
    "position": torch.int32,
    "row": torch.int32,
    "language": torch.int16,
}


ROUTES_FILE = FileKind(
    name="description of routes", max_bytes=64 * MIB, error=DataError, way_out="record it again"
)


class LayerHeader(FileShape):
    """Properties of a layer in every batch. ``per_token`` as in ``Routing``."""

    layer: str = Field(min_length=1, max_length=200)
    experts: int = Field(ge=1, le=MAX_EXPERTS)
    null_experts: int = Field(ge=0, le=MAX_EXPERTS, alias="spare")
    per_token: int = Field(ge=0, le=MAX_EXPERTS)

    @staticmethod
    def of(routes: LayerRoutes) -> "LayerHeader":
        """Return the header of the routes of one batch."""
        routing = routes.routing
        return LayerHeader(
            layer=routes.layer,
            experts=routing.num_experts,
            spare=routes.num_null_experts,
            per_token=routing.per_token,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype for expert numbers, and ``experts`` for a dropped edge."""
        return torch.uint8 if self.experts < 256 else torch.int16


class _RoutesShape(FileShape):
    languages: tuple[str, ...] = Field(min_length=1, max_length=1 << 15)
    about: dict[str, Any]
    layers: tuple[LayerHeader, ...]
    batches: Count


@dataclass(frozen=True, slots=True)
class _ColumnOnDisk:
    """A column that is appended to on disk; ``ends`` are its lengths after each batch."""

    path: Path
    dtype: torch.dtype
    ends: list[int] = field(default_factory=lambda: [0])

    def add(self, values: Tensor) -> None:
        data = values.detach().cpu().to(self.dtype).contiguous()
        with self.path.open("ab") as stream:
            if data.numel():
                stream.write(data.view(torch.uint8).numpy().data)
        self.ends.append(self.ends[-1] + data.numel())

    def tensor(self) -> Tensor:
        """Return the column as a memory-mapped tensor."""
        if not self.ends[-1]:
            return torch.empty(0, dtype=self.dtype)
        data = np.memmap(self.path, dtype=np.uint8, mode="c")  # a name may be any bytes
        return torch.from_numpy(data).view(self.dtype)


class RoutesWriter:
    """Writes a routes file: ``with RoutesWriter(path, languages=...) as file: file.add(...)``.

    The file appears at ``path`` at the end, and not at all if the block raises. ``about`` is JSON
    on the origin of the routes.
    """

    def __init__(
        self, path: Path, *, languages: Sequence[str], about: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self._head = {"languages": list(languages), "about": dict(about or {})}
        self._layers: dict[str, LayerHeader] = {}
        self._columns: dict[str, _ColumnOnDisk] = {}
        self._batches = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")

    def add(self, routes: Sequence[LayerRoutes]) -> None:
        """Append the routes of one batch: the same layers each time, in any order.

        Raises DataError for layers that differ from those of the first batch.
        """
        heads = {found.layer: LayerHeader.of(found) for found in routes}
        if not self._batches:
            self._layers = heads
        if heads != self._layers:
            raise DataError(
                f"{self.path}: a batch has the layers {_describe_layers(heads)}, the first one had "
                f"{_describe_layers(self._layers)}; write them into files of their own"
            )
        for side, tokens in {found.side: found.tokens for found in routes}.items():
            for name, dtype in _TOKEN_COLUMNS.items():
                values: Tensor = getattr(tokens, name)
                self._column(f"tokens/{side}/{name}", dtype).add(values)
        for found in routes:
            head, routing = heads[found.layer], found.routing
            self._column(f"edges/{head.layer}/expert", head.dtype).add(routing.expert)
            self._column(f"edges/{head.layer}/weight", torch.float16).add(routing.weight)
            if not head.per_token:
                self._column(f"edges/{head.layer}/token", torch.int32).add(routing.token)
        self._batches += 1

    def close(self) -> None:
        """Write the file and delete the columns."""
        try:
            tensors = {name: column.tensor() for name, column in self._columns.items()}
            for name, column in self._columns.items():
                kind, _, column_name = name.rpartition("/")
                if column_name == ("expert" if kind.startswith("edges/") else "token"):
                    tensors[f"{kind}/ends"] = torch.tensor(column.ends)
            layers = [head.model_dump(by_alias=True) for head in self._layers.values()]
            header = self._head | {"layers": layers, "batches": self._batches}
            metadata = {_KEY: str(VERSION), "routes": json.dumps(header, ensure_ascii=False)}
            write_tensors(self.path, tensors=tensors, metadata=metadata)
        finally:
            self._folder.cleanup()

    def _column(self, name: str, dtype: torch.dtype) -> _ColumnOnDisk:
        if name not in self._columns:
            path = Path(self._folder.name) / str(len(self._columns))
            self._columns[name] = _ColumnOnDisk(path, dtype)
        return self._columns[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._folder.cleanup()


class RoutesFile:
    """Reads a routes file batch by batch: ``for routes in RoutesFile(path): ...``.

    Raises CheckpointError for an incomplete file, DataError for one that is no routes file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        found = read_header(self.path)
        metadata = found.metadata
        if _KEY not in metadata:
            raise DataError(
                f"{self.path}: a safetensors file, but no routes file; "
                "moesaic eval RUN --routes FILE writes one"
            )
        if metadata[_KEY] != str(VERSION):
            raise DataError(
                f"{self.path}: version {metadata[_KEY]} of the routes format, and this moesaic "
                f"reads version {VERSION}; read it with the version that wrote it"
            )
        text = metadata.get("routes", "").encode("utf-8", "replace")
        header = parse_shape(text, _RoutesShape, kind=ROUTES_FILE, where=self.path)
        self.languages = header.languages
        self.about = header.about
        self.layers = header.layers
        self._batches = header.batches
        self._check_columns(found)

    def __len__(self) -> int:
        """The number of batches."""
        return self._batches

    def __iter__(self) -> Iterator[tuple[LayerRoutes, ...]]:
        """Yield the routes of each batch, as they were added."""
        try:
            with self._open() as file:
                ends = {name: self._read_ends(file, name) for name in self._groups()}
                for batch in range(self._batches):
                    parts = {n: slice(e[batch], e[batch + 1]) for n, e in ends.items()}
                    yield self._batch(file, parts)
        except SafetensorError as error:
            raise DataError(f"{self.path}: incomplete routes file: {error}") from error

    def _groups(self) -> list[str]:
        sides = dict.fromkeys(f"tokens/{head.layer.partition('.')[0]}" for head in self.layers)
        return [*(f"edges/{head.layer}" for head in self.layers), *sides]

    def _check_columns(self, found: TensorHeader) -> None:
        """Raise DataError unless every column exists, is flat, whole and of its length."""
        whole = {"I64", "I32", "I16", "I8", "U8"}
        kinds: dict[str, set[str]] = {}
        for head in self.layers:
            name = f"edges/{head.layer}"
            kinds |= {f"{name}/ends": whole, f"{name}/expert": whole}
            kinds[f"{name}/weight"] = {"F16", "BF16", "F32"}
            kinds |= {} if head.per_token else {f"{name}/token": whole}
            side = f"tokens/{head.layer.partition('.')[0]}"
            kinds |= {f"{side}/{column}": whole for column in (*_TOKEN_COLUMNS, "ends")}
        for name, dtypes in kinds.items():
            entry = found.tensors.get(name)
            if entry is None:
                raise self._problem(f"{printable(name)} is missing")
            if len(entry.shape) != 1 or entry.dtype not in dtypes:
                shape = f"{entry.dtype} {list(entry.shape)}"
                raise self._problem(f"{printable(name)} is {shape}, expected one dimension")
            first = "expert" if name.startswith("edges/") else "token"
            group, _, column = name.rpartition("/")
            length = (
                self._batches + 1
                if column == "ends"
                else found.tensors[f"{group}/{first}"].shape[0]
            )
            if entry.shape[0] != length:
                raise self._problem(f"{printable(name)} has {entry.shape[0]} values, not {length}")

    def _read_ends(self, file: Any, name: str) -> list[int]:
        """Return the ends of the batches of a column, which never go back."""
        ends = file.get_tensor(f"{name}/ends").long()
        first = "expert" if name.startswith("edges/") else "token"
        length = file.get_slice(f"{name}/{first}").get_shape()[0]
        if ends[0] != 0 or ends[-1] != length or (ends[1:] < ends[:-1]).any():
            raise self._problem(f"{printable(name)}/ends do not divide {length:,} values")
        return ends.tolist()

    def _check_tokens(self, tokens: RoutedTokens) -> None:
        for name, values in asdict(tokens).items():
            most = len(self.languages) if name == "language" else MAX_INT
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < most:
                found = f"{int(values.min())} to {int(values.max())}"
                raise self._problem(f"{name} of tokens: found {found}, expected 0 to {most - 1}")

    def _check_routing(self, head: LayerHeader, routing: Routing) -> None:
        """Raise DataError for an expert or token that does not exist."""
        edges, tokens = routing.expert.numel(), routing.num_tokens
        if head.per_token and edges != tokens * head.per_token:
            found = f"{edges} edges, expected {head.per_token} for each of {tokens} tokens"
            raise self._problem(f"{printable(head.layer)}: {found}")
        for name, values, most in (
            ("expert", routing.expert, head.experts),  # ``experts`` itself: a dropped edge
            ("token", routing.token, tokens - 1),
        ):
            if edges and not 0 <= int(values.min()) <= int(values.max()) <= most:
                found = f"{int(values.min())} to {int(values.max())}, expected 0 to {most}"
                raise self._problem(f"{printable(head.layer)}: found {name} {found}")

    def _problem(self, message: str) -> UserError:
        return ROUTES_FILE.problem(self.path, message)

    def _open(self) -> Any:
        return safe_open(self.path, framework="pt")

    def _batch(self, file: Any, parts: Mapping[str, slice]) -> tuple[LayerRoutes, ...]:
        sides = {}
        for name, part in parts.items():
            kind, _, side = name.partition("/")
            if kind == "tokens":
                columns = (file.get_slice(f"{name}/{c}")[part].long() for c in _TOKEN_COLUMNS)
                sides[side] = RoutedTokens(*columns)
                self._check_tokens(sides[side])
        found = []
        for head in self.layers:
            tokens = sides[head.layer.partition(".")[0]]
            part = parts[f"edges/{head.layer}"]
            if head.per_token * len(tokens) > part.stop - part.start:
                raise self._problem(f"{printable(head.layer)}: too few edges for its tokens")
            routing = _read_routing(file, head, part=part, tokens=len(tokens))
            self._check_routing(head, routing)
            found.append(LayerRoutes(head.layer, routing, tokens, head.null_experts))
        return tuple(found)


def _read_routing(file: Any, head: LayerHeader, *, part: slice, tokens: int) -> Routing:
    name = f"edges/{head.layer}"
    expert = file.get_slice(f"{name}/expert")[part].long()
    weight = file.get_slice(f"{name}/weight")[part].float()
    if head.per_token:
        token = torch.arange(tokens).repeat_interleave(head.per_token)
    else:
        token = file.get_slice(f"{name}/token")[part].long()
    return Routing(token, expert, weight, tokens, head.experts, head.per_token)


def _describe_layers(heads: Mapping[str, LayerHeader]) -> str:
    return ", ".join(
        f"{name} ({head.experts} experts, {head.per_token or 'any number'} per token)"
        for name, head in heads.items()
    )
