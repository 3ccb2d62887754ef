"""Checkpoints of any size that take no disk: safetensors files whose tensors are holes.

Names and shapes are those of a model of transformers; a hole is read as zeros.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.safetensors_io import TensorFileLayout
from moesaic.exchange.families import family_of
from moesaic.exchange.tensor_table import source_shapes

Shape = tuple[int, ...]


def write_sparse_checkpoint(
    path: Path, config: Mapping[str, Any], *, layout: str, shard_bytes: int = 5 * 10**9
) -> dict[str, Any]:
    """Write the directory of a model in bfloat16. Returns its tensors, bytes and largest tensor."""
    family = family_of(config["model_type"])
    pieces = family.pieces(family.mapping.read(config), layout=layout)
    shapes = source_shapes(pieces)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(dict(config)))
    places: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes, shard_bytes), start=1):
        file = f"model-{number:05d}.safetensors"
        tensors = {n: torch.empty(shapes[n], dtype=torch.bfloat16, device="meta") for n in names}
        form = TensorFileLayout.of(tensors, metadata=None)
        with (path / file).open("wb") as stream:
            stream.write(form.header)
            stream.truncate(form.size)
        places |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    sizes = [_bytes(shape) for shape in shapes.values()]
    return {"tensors": len(sizes), "bytes": sum(sizes), "largest_tensor": max(sizes)}


def _shards(shapes: Mapping[str, Shape], shard_bytes: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, shape in shapes.items():
        if names and size + _bytes(shape) > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape)
    yield names


def _bytes(shape: Shape) -> int:
    return torch.Size(shape).numel() * torch.bfloat16.itemsize
