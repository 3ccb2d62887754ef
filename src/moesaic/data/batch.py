"""Batch: the tensors of one (micro-)batch, and what each row is.

Letters: B rows, S source length, L target length, T real tokens. Padding id is 0 (``PAD``).
"""

from dataclasses import dataclass, replace

import torch

from moesaic.core.shapes import Int, Tensor

PAD = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of any task, right-padded with ``PAD``.

    ``source`` is what the encoder reads (S = 0 for a decoder-only model), ``target_in`` what the
    decoder reads, ``target_out`` what it must say: ``PAD`` there means "not predicted".
    ``task`` indexes the run's list of tasks; the two languages index the run's list of languages.
    ``key`` identifies each row's sample: equal for the same draw of a run whichever rank holds it
    (random bits, for what is drawn per row). All are int64 and on one device.
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
        """Target tokens that count in the loss."""
        return int((self.target_out != PAD).sum())

    @property
    def num_tokens(self) -> int:
        """Real tokens of both sides, padding left out."""
        return int((self.source != PAD).sum()) + int((self.target_in != PAD).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__slots__})
