"""Images: patches and back, splits, and the packaged digits."""

import pytest
import torch
from packages import write_packages

from moesaic.core.errors import DataError
from moesaic.data.images import ImagePatches, PackagedDigits, SyntheticBars, cut_patches
from moesaic.data.row_loader import RowLoader


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_those_of_unfold(patch):
    images = torch.randn(3, 8, 8)
    patches = cut_patches(images, patch=patch)
    assert patches.shape == (3, (8 // patch) ** 2, patch**2)
    unfolded = torch.nn.functional.unfold(images[:, None], patch, stride=patch)
    assert torch.equal(patches, unfolded.transpose(1, 2))
    assert torch.equal(patches[1, 0], images[1, :patch, :patch].flatten())


def test_no_image_is_in_both_splits_and_batches_alternate_between_classes():
    data = ImagePatches(source=SyntheticBars(number=200)).open(print)
    assert int(data.sizes("train").sum() + data.sizes("valid").sum()) == 200
    batch = next(RowLoader(data, rows=20, seed=1, prefetch=0))
    assert batch.groups["class"].tolist() == [*range(10)] * 2
    assert batch.target.values.shape == (20, 16, 4)
    held = next(RowLoader(data, rows=200, seed=1).held_out_batches())
    train = {tuple(row.flatten().tolist()) for row in batch.target.values}
    assert not train & {tuple(row.flatten().tolist()) for row in held.target.values}


def test_digits_are_read_from_the_package_and_scaled(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    write_packages(tmp_path)
    images, classes = PackagedDigits().read(print)
    assert images.shape == (40, 8, 8)
    assert classes.tolist() == [*range(10)] * 4
    assert (images.min(), images.max()) == (-1, 1)


def test_a_damaged_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    write_packages(tmp_path)
    next(tmp_path.rglob("scikit*.whl")).write_bytes(b"no archive")
    with pytest.raises(DataError, match="damaged"):
        PackagedDigits().read(print)


def test_the_test_split_of_images_is_the_held_out_one():
    data = ImagePatches(source=SyntheticBars(number=200)).open(print)
    assert data.sizes("test").tolist() == data.sizes("valid").tolist()
