"""A batch: the tensors of one (micro-)batch, and the task and languages of each row.

Letters: B rows, S source length, L target length. The padding id is 0 (``PAD``).
"""

from dataclasses import dataclass, replace

import torch

from moesaic.core.shapes import Int, Tensor

PAD = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of any task, right-padded with ``PAD``.

    ``source`` is the input of the encoder (S = 0 for a decoder-only model), ``target_in`` the input
    of the decoder, ``target_out`` the labels: ``PAD`` there means "not predicted". ``task`` indexes
    the run's tasks, the two languages its languages. ``key`` identifies each row's sample: random
    bits that are the same for the same draw on any rank. All are int64 and on one device.
    """

    source: Int[Tensor, "B S"]
    target_in: Int[Tensor, "B L"]
    target_out: Int[Tensor, "B L"]
    task: Int[Tensor, "B"]
    source_language: Int[Tensor, "B"]
    target_language: Int[Tensor, "B"]
    key: Int[Tensor, "B"]

    @property
    def rows(self) -> int:
        return self.target_in.shape[0]

    @property
    def num_predicted(self) -> int:
        """The number of target tokens in the loss."""
        return int((self.target_out != PAD).sum())

    @property
    def num_tokens(self) -> int:
        """The number of tokens of both sides, without padding."""
        return int((self.source != PAD).sum()) + int((self.target_in != PAD).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__slots__})
