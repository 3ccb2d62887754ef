"""Sampling: draw each token from the model's distribution, by temperature, top-k, top-p and min-p.

The draw of a token is a function of (seed, key of its row, number of the token) alone
(``ops/counter_rng.py``), so that a row's answer does not depend on the others of its batch.

Letters: B prompts, R rows that are decoded further, V vocabulary, L tokens generated so far.
"""

import numpy as np
import torch
from pydantic import Field

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.model.beam_search import (
    Array,
    Hypothesis,
    Search,
    SearchInputs,
    nonfinite_logits,
    token_log_prob,
)
from moesaic.ops.counter_rng import bits_to_uniform, hash_combine, hash_name

_STREAM = hash_name("sampling")


class Sample(Search):
    """Draw each token at random; ``temperature=0`` is the most probable one, as ``Greedy``.

    Logits are divided by ``temperature``. Of the distribution only the ``top_k`` most probable
    tokens are kept (0: all; arXiv:1805.04833), then the smallest set of the most probable ones with
    at least ``top_p`` of what is left (1: all; nucleus sampling, arXiv:1904.09751), and those with
    at least ``min_p`` times the probability of the most probable token (0: all; arXiv:2407.01082).
    Scores are mean log-probabilities per token, those of the model.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=0)

    def __call__(self, inputs: SearchInputs) -> list[list[Hypothesis]]:
        return _SampleState(self, inputs).run()

    def probabilities(self, log_prob: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Return the distribution that tokens are drawn from: 0 for those that are left out."""
        if self.temperature == 0:
            best = log_prob.argmax(-1, keepdim=True)
            return torch.zeros_like(log_prob).scatter_(1, best, 1.0)
        logits = log_prob / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1:
            logits = logits.masked_fill(logits < self._least_of_nucleus(logits), float("-inf"))
        if self.min_p > 0:
            least = logits.amax(1, keepdim=True) + float(np.log(self.min_p))
            logits = logits.masked_fill(logits < least, float("-inf"))
        return logits.softmax(-1)

    def draw(
        self, log_prob: Float[Tensor, "R V"], *, row_key: Int[Tensor, "R"], number: int
    ) -> Int[Tensor, "R"]:
        """Draw the token ``number`` of each row."""
        if self.temperature == 0:
            return log_prob.argmax(-1)
        # double: the sum of a large vocabulary's probabilities has to end at its total
        cumulative = self.probabilities(log_prob).double().cumsum(-1)
        bits = hash_combine(hash_combine(row_key, self.seed ^ _STREAM), number)
        point = bits_to_uniform(bits).double()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True)[:, 0]

    def _least_of_nucleus(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R 1"]:
        """Return the logit of the least probable token among those that ``top_p`` keeps."""
        ordered = logits.sort(-1, descending=True).values
        prob = ordered.softmax(-1)
        before = prob.cumsum(-1) - prob
        kept = (before < self.top_p).sum(-1, keepdim=True)
        return ordered.gather(1, (kept - 1).clamp(min=0))


class _SampleState:
    """The rows of one call that are not done; tokens and scores are kept on the host."""

    def __init__(self, config: Sample, inputs: SearchInputs) -> None:
        self.config, self.inputs = config, inputs
        rows, self.device = inputs.logits.shape[0], inputs.logits.device
        given = inputs.row_key
        self.row_key = torch.arange(rows, device=self.device) if given is None else given
        self.source = np.arange(rows)
        self.max_tokens = inputs.max_tokens.cpu().numpy()
        self.ids = np.empty((rows, 0), np.int64)  # [R, L]
        self.log_prob = np.zeros(rows, np.float32)
        self.answers: dict[int, Hypothesis] = {}

    def run(self) -> list[list[Hypothesis]]:
        logits = self.inputs.logits
        while True:
            self._extend(logits)
            if not len(self.source):
                return [[self.answers[row]] for row in range(len(self.max_tokens))]
            logits = self.inputs.step(torch.from_numpy(self.ids[:, -1].copy()).to(self.device))

    def _extend(self, logits: Float[Tensor, "R V"]) -> None:
        """Append a token to every row, and drop the rows that are done."""
        before = self.ids
        if not bool(logits.isfinite().all()):
            raise nonfinite_logits(before.shape[1] + 1)
        found = token_log_prob(
            logits, search=self.config, inputs=self.inputs, ids=before, source=self.source
        )
        drawn = self.config.draw(found, row_key=self.row_key, number=before.shape[1])
        drawn = drawn.clamp(max=found.shape[1] - 1)  # beyond it where the rules leave no token
        token, value = drawn.cpu().numpy(), found.gather(1, drawn[:, None])[:, 0].cpu().numpy()
        possible = np.isfinite(value)
        self.log_prob += np.where(possible, value, 0)
        ended = ~possible | np.isin(token, self.inputs.ends)
        for row in np.flatnonzero(ended).tolist():
            length = before.shape[1] + int(possible[row])
            self._answer(row, before, length=length, finished=bool(possible[row]))
        self.ids = np.concatenate([before, token[:, None]], 1)
        self._drop_done(np.flatnonzero(~ended))

    def _drop_done(self, rows: Array) -> None:
        """Of the rows that did not end, drop those that the observer ends or that are full."""
        stopped = np.zeros(len(rows), dtype=np.bool_)
        if self.inputs.observer is not None and len(rows):
            stopped = self.inputs.observer(self.source[rows], self.ids[rows, -1])
        done = stopped | (self.ids.shape[1] >= self.max_tokens[self.source[rows]])
        for row, by_rule in zip(rows[done].tolist(), stopped[done].tolist(), strict=True):
            self._answer(row, self.ids, length=self.ids.shape[1], finished=by_rule)
        stay = rows[~done]
        if len(stay) == len(self.source):
            return
        self.source, self.ids, self.log_prob = (
            self.source[stay],
            self.ids[stay],
            self.log_prob[stay],
        )
        if len(stay):
            index = torch.from_numpy(stay).to(self.device)
            self.row_key = self.row_key[index]
            self.inputs.reorder_cache(index, index)

    def _answer(self, row: int, ids: Array, *, length: int, finished: bool) -> None:
        log_prob = float(self.log_prob[row])
        found = Hypothesis(tuple(ids[row].tolist()), log_prob / max(length, 1), log_prob, finished)
        self.answers[int(self.source[row])] = found
