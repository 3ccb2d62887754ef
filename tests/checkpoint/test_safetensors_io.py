import pickle

import pytest
import safetensors.torch
import torch

from moesaic.checkpoint.safetensors_io import (
    DTYPE_NAMES,
    read_tensors,
    serialize_tensors,
    write_tensors,
)
from moesaic.core.errors import CheckpointError


def of_every_type():
    made = {str(t): torch.arange(6).reshape(2, 3).to(t) for t in DTYPE_NAMES}
    return made | {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "nan": torch.tensor([float("nan"), -0.0]),
        "ünï": torch.ones(1),
    }


def bits(tensor):
    return tensor.shape, tensor.dtype, tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors=of_every_type())
    ours, theirs = read_tensors(path), safetensors.torch.load_file(path)
    for name, tensor in of_every_type().items():
        assert bits(ours[name]) == bits(theirs[name]) == bits(tensor)


def test_files_of_the_reference_library_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3)}, path)
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))


def test_the_same_tensors_give_the_same_file_in_any_order(tmp_path):
    tensors = of_every_type()
    write_tensors(tmp_path / "a", tensors=tensors)
    write_tensors(tmp_path / "b", tensors=dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.pkl", "model.ckpt"])
def test_a_pickle_is_refused_by_name(tmp_path, name):
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is a pickle.*expected \.safetensors"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_is_refused_by_content(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"w": list(range(99))}, protocol=protocol))
    with pytest.raises(CheckpointError, match="a pickle with the name"):
        read_tensors(path)


def test_a_header_whose_length_looks_like_a_pickle_is_still_read(tmp_path):
    path = tmp_path / "x.safetensors"
    for pad in range(700):
        file = b"".join(serialize_tensors({"a": torch.ones(1)}, metadata={"pad": "x" * pad}))
        if file.startswith(b"\x80\x02"):
            break
    else:
        pytest.fail("no header of 0x280 bytes was made")
    path.write_bytes(file)
    assert torch.equal(read_tensors(path)["a"], torch.ones(1))


def test_a_file_truncated_anywhere_is_rejected(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors={"a": torch.ones(9)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match=r"x\.safetensors: (truncated|empty|not a|damaged)"
        ):
            read_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: no such file"):
        read_tensors(tmp_path / "nowhere.safetensors")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_tensors(tmp_path / "file" / "x.safetensors", tensors={})
