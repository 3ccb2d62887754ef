"""Ranks write the weights of a checkpoint as one file, in bounded pieces."""

import errno
import os

import pytest
import torch
from checkpoint_samples import FORMS, snapshot, written

from cost_counters import peak_bytes
from moesaic.checkpoint import streamed_export
from moesaic.checkpoint.checkpoint_directory import Disk
from moesaic.checkpoint.full_checkpoint import save_checkpoint
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.checkpoint.snapshot import Snapshot
from moesaic.checkpoint.streamed_export import export_checkpoint_weights
from moesaic.core.errors import CheckpointError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess

HALVED = {"up": torch.bfloat16}


def exported(path, source, *, world=None, disk=None):
    export_checkpoint_weights(
        path,
        source=source,
        dtypes=HALVED,
        metadata={"a": "b"},
        world=world or ProcessGroupWorld(),
        disk=disk,
    )


@pytest.mark.parametrize("form", FORMS)
def test_ranks_write_the_file_that_one_process_writes(tmp_path, form, monkeypatch):
    monkeypatch.setattr(streamed_export, "PIECE_BYTES", 16)
    source, path = written(tmp_path, form), tmp_path / "model.safetensors"
    run_on_ranks(3, exported, path, source)
    whole = {
        name: tensor.to(HALVED.get(name, tensor.dtype))
        for name, tensor in snapshot().files["model"].items()
    }
    write_tensors(tmp_path / "whole", tensors=whole, metadata={"a": "b"})
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not list(tmp_path.glob(".*.part"))


def test_a_rank_holds_a_piece_however_many_tensors_there_are(tmp_path, monkeypatch):
    """The mapped file and the view of a tensor in it take no memory, but count here."""
    monkeypatch.setattr(streamed_export, "PIECE_BYTES", 4096)
    tensors = {f"w{number}": torch.ones(64, 64) for number in range(20)}
    source = save_checkpoint(tmp_path, Snapshot(1, {"model": tensors}))
    out, world = tmp_path / "model.safetensors", SingleProcess()
    held = peak_bytes(lambda: exported(out, source, world=world))
    assert held - 20 * 64 * 64 * 4 <= 64 * 64 * 4 + 2 * 4096


class FullAt(Disk):
    def write_at(self, path, *, chunks):
        def passing():
            yield next(iter(chunks))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        super().write_at(path, chunks=passing())


def test_a_full_disk_is_named_and_leaves_the_earlier_file(tmp_path):
    source, path = written(tmp_path, "whole"), tmp_path / "model.safetensors"
    path.write_text("earlier")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: could not be written: no space"
    ):
        exported(path, source, world=SingleProcess(), disk=FullAt())
    assert path.read_text() == "earlier"
    assert not list(tmp_path.glob(".*.part"))
