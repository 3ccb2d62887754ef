"""A batch: the rows that a model reads, their labels, and the groups that each row belongs to.

Padding is a length, never a comparison with an id: whatever stands behind the end of a row is not
read. Letters: B rows, S source length, L target length, C channels of a value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moesaic.core.copies import copy_without_waiting
from moesaic.core.shapes import Bool, Float, Int, Tensor

IGNORE_LABEL = -100  # torch's ``ignore_index``: outside of any vocabulary

# the groups that rows of a text corpus have; ``Batch.groups`` may have any others
TASK = "task"
SOURCE_LANGUAGE = "source_language"
TARGET_LANGUAGE = "target_language"
DOMAIN = "domain"  # of documents; absent where no text of the run has one


@dataclass(frozen=True, slots=True)
class InputRows:
    """Right-padded rows: token ids [B S], or values [B S C] of a modality that has none.

    ``lengths`` [B] counts the real entries of each row; those behind them may be anything. ``tag``
    is the token that routers read as the tag of a row; None: its first one. ``host_lengths`` are
    the lengths in host memory, from where the rows were copied to a device.
    """

    values: Int[Tensor, "B S"] | Float[Tensor, "B S C"]
    lengths: Int[Tensor, "B"]
    tag: Int[Tensor, "B"] | None = None
    host_lengths: Int[Tensor, "B"] | None = None

    @staticmethod
    def full(values: Tensor) -> "InputRows":
        """Return rows without padding."""
        rows, width = values.shape[:2]
        return InputRows(values, torch.full((rows,), width, device=values.device))

    @staticmethod
    def empty(rows: int, *, device: torch.device | None = None) -> "InputRows":
        """Return rows of no ids (the source of a decoder-only model)."""
        return InputRows.full(torch.zeros(rows, 0, dtype=torch.long, device=device))

    @staticmethod
    def from_lists(
        rows: Sequence[Sequence[int]], *, device: torch.device | None = None
    ) -> "InputRows":
        """Return rows of ids, padded to the longest of them."""
        width = max(map(len, rows), default=0)
        padded = torch.zeros(len(rows), width, dtype=torch.long)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = torch.as_tensor(ids, dtype=torch.long)
        lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.long)
        return InputRows(padded.to(device), lengths.to(device))

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        """The number of entries of each row, padding included."""
        return self.values.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def real(self) -> Bool[Tensor, "B S"]:
        """Which entries are no padding."""
        return torch.arange(self.width, device=self.device) < self.lengths[:, None]

    @property
    def tags(self) -> Int[Tensor, "B"]:
        """The tag of each row of ids; 0 of a row without any, and of values that are no ids."""
        if self.tag is not None:
            return self.tag
        if not self.width or self.values.is_floating_point():
            return torch.zeros_like(self.lengths)
        return torch.where(self.lengths > 0, self.values[:, 0], 0)  # padding may be any number

    def select(self, rows: slice | Tensor) -> "InputRows":
        """Return some of the rows, padded as they were."""
        tag = None if self.tag is None else self.tag[rows]
        host = self.host_lengths
        # rows that a tensor on a device selects would be read on the host
        host = None if host is None or isinstance(rows, torch.Tensor) else host[rows]
        return InputRows(self.values[rows], self.lengths[rows], tag, host)

    def to(self, device: torch.device | str) -> "InputRows":
        """Return the same rows on ``device``."""
        tag = None if self.tag is None else copy_without_waiting(self.tag, device)
        host = self.lengths if self.lengths.device.type == "cpu" else self.host_lengths
        values = copy_without_waiting(self.values, device)
        return InputRows(values, copy_without_waiting(self.lengths, device), tag, host)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of any task.

    ``source`` is the input of the encoder (S = 0 for a decoder-only model), ``target`` the input of
    the decoder. ``labels`` is what the head predicts: of a language model the next ids [B L] with
    ``IGNORE_LABEL`` where nothing is predicted, of another head anything with a row per row.
    ``groups`` has the label of each row by the name of a grouping: ``task`` indexes the run's
    tasks, ``source_language`` and ``target_language`` its languages. ``key`` identifies each row's
    sample: random bits that are the same for the same draw on any rank. Groups and keys are int64;
    all tensors are on one device. ``host`` is the batch in host memory that it was copied from.
    """

    source: InputRows
    target: InputRows
    labels: Tensor
    groups: Mapping[str, Int[Tensor, "B"]]
    key: Int[Tensor, "B"]
    host: "Batch | None" = None

    @property
    def rows(self) -> int:
        return self.target.rows

    @property
    def device(self) -> torch.device:
        return self.key.device

    @property
    def num_predicted(self) -> int:
        """The number of target tokens in the loss."""
        return int((self.labels != IGNORE_LABEL).sum())

    @property
    def num_tokens(self) -> int:
        """The number of tokens of both sides, without padding."""
        return int(self.source.lengths.sum()) + int(self.target.lengths.sum())

    def select(self, rows: slice | Tensor) -> "Batch":
        """Return some of the rows, padded as they were."""
        return Batch(
            self.source.select(rows),
            self.target.select(rows),
            self.labels[rows],
            {name: label[rows] for name, label in self.groups.items()},
            self.key[rows],
            None if self.host is None or isinstance(rows, torch.Tensor) else self.host.select(rows),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on ``device``; the host does not wait for the copies."""
        if self.device == torch.device(device):
            return self
        return replace(
            self,
            source=self.source.to(device),
            target=self.target.to(device),
            labels=copy_without_waiting(self.labels, device),
            groups={n: copy_without_waiting(label, device) for n, label in self.groups.items()},
            key=copy_without_waiting(self.key, device),
            host=self if self.device.type == "cpu" else self.host,
        )
