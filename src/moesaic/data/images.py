"""Rows of a diffusion model: small images as patches, with their class as a group label.

Letters: B rows, H height, W width, P patches of an image, C values of a patch.
"""

import gzip
import hashlib
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import DataError
from moesaic.core.shapes import Float, Tensor
from moesaic.corpus.sources.package_archives import PyPIPackage, archive_members, fetch_package
from moesaic.data.batch import Batch, InputRows
from moesaic.data.numpy_counter_rng import random_uniform
from moesaic.data.ragged import IntArray
from moesaic.data.row_loader import RowDataset, RowDraws, RowOrigin, RowSource
from moesaic.data.series import FloatArray, Notify

_SPLIT, _SHAPES = 51, 52
_SIDE, _LEVELS, _CLASSES = 8, 16, 10
_PACKAGE = PyPIPackage(name="scikit-learn", version="1.9.1")
_FILE = "sklearn/datasets/data/digits.csv.gz"


class ImageSource(Choice):
    """Family: where images come from."""

    licence: ClassVar[str] = "CC0-1.0"

    def read(self, notify: Notify) -> tuple[FloatArray, IntArray]:
        """Return images [N, H, W] from -1 to 1, and their classes [N]. Raises DataError."""
        raise NotImplementedError


class PackagedDigits(ImageSource):
    """1,797 handwritten digits of 8 x 8 points, read from scikit-learn's wheel (9 MB).

    They are the test set of UCI's "Optical Recognition of Handwritten Digits" (CC BY 4.0).
    """

    licence: ClassVar[str] = "CC BY 4.0"

    def read(self, notify: Notify) -> tuple[FloatArray, IntArray]:
        path = fetch_package(_PACKAGE, progress=notify).path
        with archive_members(path) as files:
            data = next((file.read() for file in files if file.name == _FILE), None)
        if data is None:
            raise DataError(f"{path}: found no {_FILE}; delete the archive and start again")
        table = np.loadtxt(gzip.decompress(data).decode().splitlines(), delimiter=",", ndmin=2)
        if table.shape[1] != _SIDE**2 + 1:
            raise DataError(f"{path}: {_FILE} has {table.shape[1]} columns, expected 65")
        images = table[:, :-1].reshape(-1, _SIDE, _SIDE)
        return images / (_LEVELS / 2) - 1, table[:, -1].astype(np.int64)


class SyntheticBars(ImageSource):
    """``number`` images with one bright bar each; its row or column is the class."""

    number: int = Field(default=200, ge=_CLASSES)

    def read(self, notify: Notify) -> tuple[FloatArray, IntArray]:
        del notify
        classes = np.arange(self.number) % _CLASSES
        images = 0.2 * random_uniform(_SHAPES, np.arange(self.number * _SIDE**2)) - 1
        images = images.reshape(-1, _SIDE, _SIDE)
        half = _CLASSES // 2
        for image, number in zip(images, classes.tolist(), strict=True):
            line = 1 + number % half
            image[(line, slice(None)) if number < half else (slice(None), line)] += 1.8
        return images, classes


class ImagePatches(RowSource):
    """Images cut into patches of ``patch`` x ``patch`` points, row by row.

    A row's values and labels are the clean patches; a head adds the noise. Rows of a batch
    alternate between the classes; ``class`` is a group label. Images are held out by a hash.
    """

    source: ImageSource = PackagedDigits()
    patch: int = Field(default=2, ge=1)
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of the images")

    @property
    def positions(self) -> int:
        return (_SIDE // self.patch) ** 2

    def open(self, notify: Notify) -> "ImageDataset":
        return ImageDataset(self, *self.source.read(notify))


class ImageDataset(RowDataset):
    """Given images [N, H, W] and classes [N]. Group g is class g.

    The held-out images are the rows of ``valid`` and of ``test``, as for series.
    """

    def __init__(self, rows: ImagePatches, images: FloatArray, classes: IntArray) -> None:
        self.rows = rows
        self.patches = cut_patches(torch.from_numpy(images).float(), patch=rows.patch)
        names = tuple(str(number) for number in range(int(classes.max()) + 1))
        self.labels = {"class": names}
        source = rows.source
        self.origins = [RowOrigin(type(source).__name__, source.licence, len(images))]
        held_out = random_uniform(_SPLIT, np.arange(len(images))) < rows.held_out
        self._members = {
            split: [np.flatnonzero((classes == c) & chosen) for c in range(len(names))]
            for split, chosen in (("train", ~held_out), ("valid", held_out), ("test", held_out))
        }
        digest = hashlib.sha256(repr(rows.to_dict()).encode())
        digest.update(images.tobytes())
        digest.update(classes.tobytes())
        self.fingerprint = digest.hexdigest()

    def sizes(self, split: str) -> IntArray:
        return np.array([len(members) for members in self._members[split]])

    def make_batch(self, draws: RowDraws, *, split: str) -> Batch:
        pairs = zip(draws.group.tolist(), draws.row.tolist(), strict=True)
        index = torch.tensor([int(self._members[split][g][r]) for g, r in pairs], dtype=torch.long)
        patches = self.patches[index]
        return Batch(
            source=InputRows.empty(len(index)),
            target=InputRows.full(patches),
            labels=patches,
            groups={"class": torch.from_numpy(draws.group)},
            key=torch.from_numpy(draws.key.astype(np.int64)),
        )


def cut_patches(images: Float[Tensor, "B H W"], *, patch: int) -> Float[Tensor, "B P C"]:
    """Return the patches of images, row by row; their points row by row."""
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    grid = images.view(len(images), rows, patch, columns, patch)
    return grid.transpose(2, 3).reshape(len(images), rows * columns, patch * patch)
