"""Document losses: the likelihood of documents under a language model, in sliding windows.

A document's positions are its tokens and its end, predicted from the begin token on. Letters: B
windows, L their length, N scored positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Tensor
from moesaic.corpus.pair import Text
from moesaic.data.batch import IGNORE_LABEL, Batch, InputRows
from moesaic.evaluate.perplexity import DocumentLoss, ScoredWindow, sliding_windows
from moesaic.model.transformer import Transformer
from moesaic.serve.text_generator import TextGenerator

_BATCH_TOKENS = 4096
_LOGIT_CELLS = 1 << 24  # of the logits held at once: 64 MiB


@dataclass(frozen=True, slots=True)
class _Window:
    document: int
    ids: Sequence[int]
    scored: ScoredWindow

    @property
    def inputs(self) -> Sequence[int]:
        return self.ids[self.scored.start : self.scored.stop]

    @property
    def labels(self) -> list[int]:
        following = self.ids[self.scored.start + 1 : self.scored.stop + 1]
        skipped = self.scored.first - self.scored.start
        return [IGNORE_LABEL] * skipped + list(following[skipped:])


@torch.inference_mode()
def document_losses(
    generator: TextGenerator, texts: Sequence[Text], *, window: int, stride: int
) -> list[DocumentLoss]:
    """Return the loss of each text, normalised by the rules of the run's corpus; empty: left out.

    A text of a language that the model does not have is scored in the generator's usual one.
    """
    known = generator.tokenizer.languages
    plain = [(text, generator.normalise(text.text)) for text in texts]
    plain = [(text, normal) for text, normal in plain if normal]
    encoded = generator.tokenizer.encode_batch([normal for _, normal in plain])
    windows: list[_Window] = []
    for number, ((text, _), ids) in enumerate(zip(plain, encoded, strict=True)):
        begin = generator.begin_tokens(text.language if text.language in known else None)
        row = (*begin, *ids, generator.end_token)
        skipped = len(begin) - 1  # tokens of the beginning that are no prediction
        for found in sliding_windows(len(row) - 1, window=window, stride=stride):
            scored = ScoredWindow(found.start, found.stop, max(found.first, skipped))
            windows.append(_Window(number, row, scored))
    total = [0.0] * len(plain)
    model = generator.model
    for batch in _batches(windows):
        losses = row_losses(model, _window_batch(batch, device=model.device))
        for one, nll in zip(batch, losses, strict=True):
            total[one.document] += nll
    return [
        DocumentLoss(nll, len(ids) + 1, len(normal.encode()), text.language, _domain(text))
        for (text, normal), ids, nll in zip(plain, encoded, total, strict=True)
    ]


def _domain(text: Text) -> str:
    """Return a document's domain; the package or file that a side of a pair is from."""
    return text.domain or text.origin


def _batches(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    """Yield windows of similar length, the longest first."""
    order = sorted(windows, key=lambda one: -len(one.inputs))
    while order:
        count = max(1, _BATCH_TOKENS // len(order[0].inputs))
        yield order[:count]
        order = order[count:]


def row_losses(model: Transformer, batch: Batch) -> list[float]:
    """Return the summed loss of each row of a batch, in nats."""
    output = model(batch)
    size = max(1, _LOGIT_CELLS // model.config.vocab_size)
    parts = zip(output.hidden.split(size), output.label.split(size), strict=True)
    nll = torch.cat([_nll(model.predict(hidden), label) for hidden, label in parts])
    sums = torch.zeros(batch.rows, dtype=torch.float64, device=model.device)
    return sums.index_add(0, output.row, nll).tolist()


def _window_batch(windows: Sequence[_Window], *, device: torch.device) -> Batch:
    inputs = InputRows.from_lists([one.inputs for one in windows], device=device)
    labels = torch.full_like(inputs.values, IGNORE_LABEL)
    for row, one in zip(labels, windows, strict=True):
        row[: len(one.inputs)] = torch.tensor(one.labels, device=device)
    zeros = torch.zeros(len(windows), dtype=torch.long, device=device)
    return Batch(InputRows.empty(len(windows), device=device), inputs, labels, {}, zeros)


def _nll(logits: Tensor, label: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(1, label[:, None])[:, 0].double()
