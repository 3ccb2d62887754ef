"""Stored weights: a model's tensors in a file or a checkpoint, read into shards by byte ranges.

Files are memory-mapped (``tensor_reader.py``): of a tensor, only the slices that a rank's shards
overlap are read, and no whole tensor is made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.checkpoint.block_index import (
    DTYPE_BY_NAME,
    StoredBlock,
    StoredTensor,
    coverage_problems,
    first_few,
    read_index,
)
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.safetensors_io import read_header, reject_pickle
from moesaic.checkpoint.snapshot import Shard, ShardBlock, as_shard
from moesaic.checkpoint.tensor_reader import TensorReader, open_reader
from moesaic.core.config_upgrade import current_name
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.model.weights import (
    export_weights,
    fitting_problems,
    raise_if_unfit,
    require_fitting_weights,
)
from moesaic.nn.initializer import allocate_on, allocate_parameters


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The ``tensors`` of a model by name, and the reader of their files."""

    tensors: Mapping[str, StoredTensor]
    reader: TensorReader

    @torch.no_grad()
    def read_into(self, shards: Mapping[str, Shard]) -> None:
        """Fill every block of the shards; each may have another dtype than what is stored.

        Raises CheckpointError naming every tensor that is missing or of another shape, before
        anything is read.
        """
        expected = {name: shard.shape for name, shard in shards.items()}
        raise_if_unfit(fitting_problems(expected, self.shapes))
        for name, shard in shards.items():
            for block in shard.blocks:
                self._read_block(name, block)

    def whole(self, name: str) -> Tensor:
        """Return one whole tensor, in the dtype that it is stored in."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into({name: as_shard(tensor)})
        return tensor

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def _read_block(self, name: str, wanted: ShardBlock) -> None:
        stored, filled = self.tensors[name], 0
        for block in stored.blocks:
            start = tuple(map(max, block.offset, wanted.offset))
            ends = (_end(block.offset, block.shape), _end(wanted.offset, wanted.data.shape))
            shape = tuple(e - s for s, e in zip(start, map(min, *ends), strict=True))
            if any(size <= 0 for size in shape):
                continue
            target = wanted.data
            for dim, (first, size) in enumerate(zip(start, shape, strict=True)):
                target = target.narrow(dim, first - wanted.offset[dim], size)
            within = tuple(s - o for s, o in zip(start, block.offset, strict=True))
            target.copy_(self.reader.read_slice(stored, block=block, start=within, shape=shape))
            filled += target.numel()
        if filled != wanted.data.numel():
            problems = [f"{name}: {text}" for text in coverage_problems(stored)]
            raise CheckpointError(f"{self.reader.directory}: {first_few(problems)}")


def load_transformer(
    config: ModelConfig,
    *paths: Path,
    device: str = "cpu",
    attach: Callable[[Transformer], None] = lambda _model: None,
) -> Transformer:
    """Return the whole model of stored weights: each is read once, into its place on ``device``.

    A tensor is read from the last path that has it. ``attach`` adds adapters to the model, which
    is without values. Raises CheckpointError, before anything is allocated, if they do not fit.
    """
    model = Transformer.without_values(config)
    attach(model)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(path)) for path in paths]
        source = {name: stored for stored in opened for name in stored.tensors}
        require_fitting_weights(model, {n: each.tensors[n].shape for n, each in source.items()})
        place = torch.device(device)
        allocate_parameters(model, allocate=allocate_on(place), device=place)
        shards = {name: as_shard(tensor) for name, tensor in export_weights(model).items()}
        for stored in opened:
            stored.read_into({n: s for n, s in shards.items() if source[n] is stored})
    return model


def index_of_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file under their names in it.

    Raises CheckpointError if it is missing, truncated or a pickle.
    """
    return {
        name: StoredTensor(
            entry.shape,
            DTYPE_BY_NAME[entry.dtype],
            (StoredBlock(path.name, name, (0,) * len(entry.shape), entry.shape),),
        )
        for name, entry in read_header(path).tensors.items()
    }


@contextmanager
def open_weights(path: Path) -> Iterator[StoredWeights]:
    """Open the weights of a safetensors file, or of a checkpoint directory of either form.

    Hashes are not checked. Raises CheckpointError if it is missing, truncated or a pickle.
    """
    if path.is_dir():
        reject_pickles(path)
        tensors = read_index(path, manifest=read_manifest(path)).files.get("model", {})
        directory = path
    else:
        directory, written_by = path.parent, read_header(path).file_format
        tensors = {
            current_name(name, file_format=written_by): stored
            for name, stored in index_of_file(path).items()
        }
    with open_reader(directory) as reader:
        yield StoredWeights(tensors, reader)


def reject_pickles(directory: Path) -> None:
    """Check the tensor files for pickles before hashing: a clearer message than "altered"."""
    for path in sorted(directory.glob("*.safetensors")):
        if path.is_file() and path.stat().st_size >= 9:  # a shorter file is truncated
            reject_pickle(path)


def _end(start: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    return tuple(s + n for s, n in zip(start, size, strict=True))
