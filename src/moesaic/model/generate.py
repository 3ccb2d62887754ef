"""Generation: decode a batch of sources by greedy or beam search, with n-best answers.

A search (``Greedy``, ``Beam``) needs two functions of a model: decode one token per row, and
reorder the rows of its cache.

Letters: B sources, S source length, k beam size, R rows in the cache, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.data.tokenizer import BOS, EOS, MASK, PAD, UNK
from moesaic.model.transformer import Transformer

DecodeStep = Callable[[Tensor], Tensor]  # ids [R] -> logits [R, V]
ReorderCache = Callable[[Tensor], None]  # index [R'] of the rows that are decoded further
SUPPRESSED_TOKENS = (PAD, BOS, UNK, MASK)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Tokens after the forced first one, without ``EOS``; ``score`` is length-normalised.

    ``log_prob`` is the sum, ``EOS`` included. ``finished`` is false if it reached ``max_tokens``.
    """

    ids: tuple[int, ...]
    score: float
    log_prob: float
    finished: bool


@dataclass(frozen=True, slots=True)
class SearchInputs:
    """The first logits of each source, the model's decoding functions, limits, suppressed tokens.

    ``max_tokens`` counts generated tokens, ``EOS`` included.
    """

    logits: Float[Tensor, "B V"]
    step: DecodeStep
    reorder_cache: ReorderCache
    max_tokens: Int[Tensor, "B"]
    suppressed: Bool[Tensor, "V"]


class Search(Choice):
    """Family of searches."""

    def __call__(self, inputs: SearchInputs) -> list[list[Hypothesis]]:
        """Return the hypotheses of each source, best first."""
        raise NotImplementedError


class Greedy(Search):
    """The most probable token at each step; scores are mean log-probabilities per token."""

    def __call__(self, inputs: SearchInputs) -> list[list[Hypothesis]]:
        return Beam(size=1)(inputs)


class Beam(Search):
    """Beam search: hypotheses are ranked by ``log_prob / length ** length_penalty``.

    Length counts ``EOS`` (as in fairseq; 0 ranks by the sum). A source is done when ``size`` of its
    hypotheses are finished (fairseq's rule), when no unfinished one can still enter its ``n_best``,
    or when it reaches ``max_tokens``. ``size=1`` is greedy search.
    """

    size: int = Field(default=4, ge=1)
    length_penalty: float = Field(default=1.0, ge=0)
    n_best: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Beam":
        if self.n_best > self.size:
            raise ValueError(f"n_best of at most size={self.size}")
        return self

    def __call__(self, inputs: SearchInputs) -> list[list[Hypothesis]]:
        return _BeamState(self, inputs).run()

    def normalise(self, log_prob: float, *, length: int) -> float:
        """Return the score of a hypothesis of ``length`` tokens."""
        return log_prob / max(length, 1) ** self.length_penalty


class _BeamState:
    """The unfinished hypotheses of one call: k rows for each source that is not done."""

    def __init__(self, config: Beam, inputs: SearchInputs) -> None:
        self.config, self.inputs = config, inputs
        sources = inputs.logits.shape[0]
        self.finished: list[list[Hypothesis]] = [[] for _ in range(sources)]
        self.sources = list(range(sources))  # the source of each group of k rows
        self.max_tokens = inputs.max_tokens.tolist()
        self.ids = torch.empty(sources, 0, dtype=torch.long, device=inputs.logits.device)
        self.log_prob = torch.zeros(sources, 1, device=inputs.logits.device)

    def run(self) -> list[list[Hypothesis]]:
        logits = self.inputs.logits
        while self.sources:
            last = self._extend(logits)
            if not self.sources:
                break
            logits = self.inputs.step(last)
        best = self.config.n_best
        return [sorted(found, key=lambda h: -h.score)[:best] for found in self.finished]

    def _extend(self, logits: Float[Tensor, "R V"]) -> Int[Tensor, "R2"]:
        """Append a token to every hypothesis, reorder the cache's rows, and return the tokens."""
        k, width = self.config.size, self.log_prob.shape[1]
        groups, vocab = len(self.sources), logits.shape[-1]
        token_log_prob = logits.log_softmax(-1).masked_fill(self.inputs.suppressed, float("-inf"))
        total = (self.log_prob.view(-1, 1) + token_log_prob).view(groups, width * vocab)
        top, flat = total.topk(min(2 * k, total.shape[1]), dim=1)
        beam = torch.div(flat, vocab, rounding_mode="floor")
        token = flat - beam * vocab
        # only an EOS among a source's k best candidates finishes a hypothesis
        among_best = torch.arange(top.shape[1], device=top.device)[None] < k
        ends = (token == EOS) & top.isfinite() & among_best
        for group, column in ends.nonzero().tolist():
            row = group * width + int(beam[group, column])
            self._add_hypothesis(group, row, float(top[group, column]), finished=True)
        top = top.masked_fill(token == EOS, float("-inf"))
        top, pick = top.topk(min(k, top.shape[1]), dim=1)
        beam, token = beam.gather(1, pick), token.gather(1, pick)
        offset = torch.arange(groups, device=beam.device)[:, None] * width
        self.ids = torch.cat([self.ids[(beam + offset).flatten()], token.view(-1, 1)], 1)
        self.log_prob = top
        return self._drop_finished_sources(beam + offset)

    def _add_hypothesis(self, group: int, row: int, log_prob: float, *, finished: bool) -> None:
        ids = tuple(self.ids[row].tolist())
        score = self.config.normalise(log_prob, length=len(ids) + finished)
        self.finished[self.sources[group]].append(Hypothesis(ids, score, log_prob, finished))

    def _drop_finished_sources(self, rows: Int[Tensor, "b k"]) -> Int[Tensor, "R2"]:
        best, width = self.log_prob[:, 0].tolist(), rows.shape[1]
        stay = [group for group, log_prob in enumerate(best) if self._continues(group, log_prob)]
        index = torch.tensor(stay, dtype=torch.long, device=rows.device)
        self.sources = [self.sources[group] for group in stay]
        self.ids = self.ids.view(len(best), width, -1)[index].flatten(0, 1)
        self.log_prob = self.log_prob[index]
        if stay:
            self.inputs.reorder_cache(rows[index].flatten())
        return self.ids[:, -1]

    def _continues(self, group: int, log_prob: float) -> bool:
        """Return whether a source is decoded further; at ``max_tokens`` keep what is unfinished."""
        source, n_best = self.sources[group], self.config.n_best
        length, limit = self.ids.shape[1], self.max_tokens[source]
        scores = sorted((h.score for h in self.finished[source]), reverse=True)
        if log_prob == float("-inf") or len(scores) >= self.config.size:
            return False
        if length >= limit:
            width = self.log_prob.shape[1]
            for beam, value in enumerate(self.log_prob[group].tolist()):
                if value > float("-inf"):
                    self._add_hypothesis(group, group * width + beam, value, finished=False)
            return False
        # an upper bound: log_prob only falls, length only grows
        bound = self.config.normalise(log_prob, length=limit)
        return len(scores) < n_best or bound > scores[n_best - 1]


@torch.inference_mode()
def generate(
    model: Transformer,
    source: Int[Tensor, "B S"],
    *,
    tag: Int[Tensor, "B"],
    search: Search | None = None,
    max_tokens: int | Int[Tensor, "B"] = 128,
    suppress_tokens: Sequence[int] = SUPPRESSED_TOKENS,
) -> list[list[Hypothesis]]:
    """Decode each source (right-padded with ``PAD``), the first token forced to be ``tag``.

    A decoder-only model reads ``source`` and ``tag`` as its prompt. ``max_tokens`` is per source or
    for all, ``EOS`` included; ``suppress_tokens`` are never generated. Default search: ``Greedy``.
    The answer to a source does not depend on the others in the batch (if the model drops no tokens
    in evaluation).
    """
    if not source.shape[0]:
        return []
    training = model.training
    model.eval()
    try:
        rows = torch.arange(source.shape[0], device=source.device)
        cache = model.init_cache(model.encode(source), rows)
        prompt = tag[:, None] if model.config.encoder.layers else append_tag(source, tag=tag)
        logits = model.step(prompt, cache)
        suppressed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=source.device)
        suppressed[list(suppress_tokens)] = True
        inputs = SearchInputs(
            logits=logits,
            step=lambda ids: model.step(ids[:, None], cache),
            reorder_cache=cache.reorder,
            max_tokens=torch.as_tensor(max_tokens, device=source.device).expand(source.shape[0]),
            suppressed=suppressed,
        )
        return (search or Greedy())(inputs)
    finally:
        model.train(training)


def append_tag(source: Int[Tensor, "B S"], *, tag: Int[Tensor, "B"]) -> Int[Tensor, "B S1"]:
    """Append the tag to the real tokens of each right-padded row."""
    longer = torch.nn.functional.pad(source, (0, 1), value=PAD)
    return longer.scatter(1, (source != PAD).sum(1, keepdim=True), tag[:, None])
