import itertools
import random

import pytest
import torch
from checkpoint_samples import EXPERT_PARAMETERS, file_with, rewritten, snapshot, written

from moesaic.checkpoint.block_index import (
    StoredBlock,
    StoredTensor,
    block_key,
    coverage_problems,
    num_experts_of,
    overlapping_blocks,
    read_index,
)
from moesaic.checkpoint.full_checkpoint import load_checkpoint, read_weights
from moesaic.checkpoint.manifest import read_manifest
from moesaic.core.errors import CheckpointError


def some_blocks(draw):
    shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 3)))
    blocks = []
    for n in range(draw.randint(0, 6)):
        offset = tuple(draw.randrange(size) for size in shape)
        length = tuple(draw.randint(0, size - o) for size, o in zip(shape, offset, strict=True))
        blocks.append(StoredBlock("f", str(n), offset, length))
    return shape, blocks


def values(block):
    ends = zip(block.offset, block.shape, strict=True)
    return set(itertools.product(*(range(o, o + n) for o, n in ends)))


@pytest.mark.parametrize("seed", range(60))
def test_overlaps_and_gaps_are_those_of_counting_every_value(seed):
    shape, blocks = some_blocks(random.Random(seed))
    expected = {
        frozenset((a.key, b.key))
        for a, b in itertools.combinations(blocks, 2)
        if values(a) & values(b)
    }
    assert {frozenset((a.key, b.key)) for a, b in overlapping_blocks(blocks)} == expected
    covered = [v for block in blocks for v in values(block)]
    everything = set(itertools.product(*(range(n) for n in shape)))
    once = sorted(covered) == sorted(everything)
    assert (coverage_problems(StoredTensor(shape, torch.float32, tuple(blocks))) == []) == once


def test_a_scalar_is_stored_once():
    one = StoredBlock("f", "a", (), ())
    assert coverage_problems(StoredTensor((), torch.float32, (one,))) == []
    assert "overlap" in coverage_problems(StoredTensor((), torch.float32, (one, one)))[0]
    assert coverage_problems(StoredTensor((), torch.float32, ())) == ["it is missing"]


def test_expert_parameters_are_found_by_name_and_first_dim():
    expert_parameters = {"layer.up": 4, "layer.none": 4}
    assert num_experts_of("layer.up", shape=(4, 2, 3), expert_parameters=expert_parameters) == 4
    assert (
        num_experts_of("exp_avg/layer.up", shape=(4, 2, 3), expert_parameters=expert_parameters)
        == 4
    )
    assert num_experts_of("step/layer.up", shape=(), expert_parameters=expert_parameters) == 0
    assert num_experts_of("layer.up", shape=(3, 2), expert_parameters=expert_parameters) == 0
    assert num_experts_of("layer.router", shape=(4, 2), expert_parameters=expert_parameters) == 0
    assert num_experts_of("layer.none", shape=(4, 0), expert_parameters=expert_parameters) == 0


def test_a_block_is_named_after_its_expert_and_its_place():
    shape = (8, 2, 6)
    whole = ((7, 0, 0), (1, 2, 6))
    part = ((7, 0, 4), (1, 2, 2))
    assert block_key("model/up", block=whole, shape=shape, split=True) == "model/up/expert-0007"
    assert block_key("model/up", block=part, shape=shape, split=True) == "model/up/expert-0007@0,4"
    assert block_key("model/w", block=((0, 0), (2, 6)), shape=(2, 6), split=False) == "model/w"
    assert block_key("model/w", block=((1, 0), (1, 6)), shape=(2, 6), split=False) == "model/w@1,0"


def test_an_index_that_is_damaged_is_named(tmp_path):
    path = written(tmp_path, "three shards")
    rewritten(path, "index.json", lambda body: body | {"format": 7})
    with pytest.raises(CheckpointError, match=r"index\.json: format: found 7, expected one of 1"):
        read_index(path, manifest=read_manifest(path))
    (path / "index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json: .*expected a mapping"):
        read_index(path, manifest=read_manifest(path))


def renumbered(body):
    """Expert 0 is listed as expert 3 a second time: as many values as before."""
    for _, name, stored in body["tensors"]:
        if name == "up":
            stored["blocks"][0][1][0] = 3
    return body


@pytest.mark.parametrize("read", [load_checkpoint, read_weights])
def test_a_tensor_that_blocks_do_not_make_up_is_not_loaded(tmp_path, read):
    path = written(tmp_path, "three shards")
    rewritten(path, "index.json", renumbered)
    with pytest.raises(CheckpointError, match=r"at \[3, 0, 0\] of .* overlap"):
        read(path)


def test_weights_are_read_from_either_form_and_from_a_file(tmp_path):
    whole, cut = written(tmp_path, "whole"), written(tmp_path, "three shards")
    for path in (whole, cut, whole / "model.safetensors"):
        found = read_weights(path)
        assert found.keys() == snapshot().files["model"].keys()
        assert all(torch.equal(found[n], t) for n, t in snapshot().files["model"].items())
    assert read_manifest(cut).expert_parameters == EXPERT_PARAMETERS
    assert load_checkpoint(cut, only=("optimizer",)).files.keys() == {"optimizer"}
    assert file_with(cut, "model/up/expert-0003").startswith("shard-0000")
