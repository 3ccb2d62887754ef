"""An import reads every byte of the weights once, however they are stored, and in bounded parts."""

import json
import math
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_directories import (
    DIM,
    HIDDEN,
    MIXTRAL_CONFIG,
    mixtral_shapes,
    random_tensors,
    write_directory,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.exchange import tensor_files
from moesaic.exchange.import_model import import_model
from moesaic.exchange.tensor_files import FileTensor, PutTogether, TensorFiles
from moesaic.exchange.tensor_table import Region, TensorPiece
from moesaic.exchange.torchtitan_names import hugging_face_tensors


@pytest.fixture
def sizes() -> Iterator[list[int]]:
    """The bytes of each read; plain copies are in blocks of 512 bytes."""
    read, found = FileTensor._read_values, list[int]()

    def counting(self: FileTensor, first: int, count: int) -> torch.Tensor:
        found.append(count * self.dtype.itemsize)
        return read(self, first, count)

    with (
        patch.object(FileTensor, "_read_values", counting),
        patch.object(tensor_files, "BLOCK_BYTES", 512),
    ):
        yield found


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_safetensors_are_read_once(layout, tmp_path, sizes):
    tensors = random_tensors(mixtral_shapes(layout))
    import_model(write_directory(tmp_path / "theirs", tensors), out=tmp_path / "ours")
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())
    matrix = torch.bfloat16.itemsize * 2 * HIDDEN * DIM  # both maps of one expert
    assert max(sizes) <= max(512, matrix)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_distributed_checkpoint_of_two_ranks_is_read_once(dim, tmp_path, sizes):
    tensors = random_tensors(mixtral_shapes("fused"))
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_CONFIG))

    def save() -> None:
        mesh = init_device_mesh("cpu", (2,))
        state = {
            name: distribute_tensor(tensor, mesh, [Shard(min(dim, tensor.ndim - 1))])
            for name, tensor in tensors.items()
        }
        dcp.save(state, checkpoint_id=tmp_path)

    run_on_ranks(2, save)
    import_model(tmp_path, out=tmp_path / "ours")
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())


def test_rotated_rows_are_read_by_heads(tmp_path, sizes):
    heads, pairs, columns = 4, 6, 8
    rows = torch.arange(heads * 2 * pairs * columns).float().view(-1, columns)
    (tmp_path / "rows").write_bytes(rows.numpy().tobytes())
    stored = FileTensor(tmp_path / "rows", tuple(rows.shape), rows.dtype, 0)
    files = TensorFiles([])
    files.tensors = dict(
        hugging_face_tensors(
            {
                "layers.0.attention.qkv_linear.wq.weight": stored,
                "tok_embeddings.weight": stored,
            },
            {"model_type": "llama", "num_attention_heads": heads},
        )
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = Region(name, (0, 0), tuple(rows.shape))
    made = torch.cat(list(PutTogether([TensorPiece(whole, whole)], files)(name)))
    wanted = rows.view(heads, pairs, 2, columns).transpose(1, 2).reshape(rows.shape)
    assert made.equal(wanted)
    block, head = 512, rows.nbytes // heads
    assert max(sizes) <= block + 2 * head
    assert sum(sizes) <= rows.nbytes + 2 * head * math.ceil(rows.nbytes / block)
