"""Generate: answers of a model to a batch of sources, by any search.

Letters: B sources, S source length.

Search: how the next tokens are chosen, from greedy to a beam with n-best answers.

A search sees a model only as ``Stepper``: feed one token per row, get logits; keep some rows.

Letters: B sources, k beam size, R live rows, V vocabulary.
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


ReorderCache = Callable[[Tensor], None]  # index [R'] of the rows that go on


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Tokens after the forced first one, without ``EOS``; ``score`` is length-normalised.

    ``log_prob`` is the plain sum, ``EOS`` included. ``finished`` is false if it hit ``max_tokens``.
    """

    ids: tuple[int, ...]
    score: float
    log_prob: float
    finished: bool


@dataclass(frozen=True, slots=True)
class SearchInputs:
    """What a search decodes: first logits of each source, the model, limits and forbidden tokens.

    ``max_tokens`` counts generated tokens, ``EOS`` included.
    """

    logits: Float[Tensor, "B V"]
    step: DecodeStep
    reorder_cache: ReorderCache
    max_tokens: Int[Tensor, "B"]
    suppressed: Bool[Tensor, "V"]


class Search(Choice):
    """Family of searches."""

    def __call__(self, problem: SearchInputs) -> list[list[Hypothesis]]:
        """Return the answers of each source, best first."""
        raise NotImplementedError


class Greedy(Search):
    """The likeliest token each time; scores are mean log-probabilities per token."""

    def __call__(self, problem: SearchInputs) -> list[list[Hypothesis]]:
        return Beam(size=1)(problem)


class Beam(Search):
    """Beam search: hypotheses are ranked by ``log_prob / length ** length_penalty``.

    Length counts ``EOS`` (as in fairseq; 0 ranks by the plain sum). A source is done when ``size``
    of its hypotheses are finished (fairseq's rule), when none alive can still enter its ``n_best``,
    or when it is out of room. ``size=1`` is greedy search.
    """

    size: int = Field(default=4, ge=1)
    length_penalty: float = Field(default=1.0, ge=0)
    n_best: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Beam":
        if self.n_best > self.size:
            raise ValueError(f"n_best of at most size={self.size}")
        return self

    def __call__(self, problem: SearchInputs) -> list[list[Hypothesis]]:
        return _BeamState(self, problem).run()

    def normalise(self, log_prob: float, *, length: int) -> float:
        """The score of a hypothesis of ``length`` tokens."""
        return log_prob / max(length, 1) ** self.length_penalty


class _BeamState:
    """The live hypotheses of one call: k rows for each source that is not done."""

    def __init__(self, rules: Beam, problem: SearchInputs) -> None:
        self.config, self.problem = rules, problem
        sources = problem.logits.shape[0]
        self.done: list[list[Hypothesis]] = [[] for _ in range(sources)]
        self.live = list(range(sources))  # source of each block of k rows
        self.max_tokens = problem.max_tokens.tolist()
        self.ids = torch.empty(sources, 0, dtype=torch.long, device=problem.logits.device)
        self.score = torch.zeros(sources, 1, device=problem.logits.device)

    def run(self) -> list[list[Hypothesis]]:
        logits = self.problem.logits
        while self.live:
            last = self._extend(logits)
            if not self.live:
                break
            logits = self.problem.step(last)
        best = self.config.n_best
        return [sorted(found, key=lambda h: -h.score)[:best] for found in self.done]

    def _extend(self, logits: Float[Tensor, "R V"]) -> Int[Tensor, "left"]:
        """Choose the next token of every live source; return them, the model's rows reordered."""
        k, width = self.config.size, self.score.shape[1]
        blocks, vocab = len(self.live), logits.shape[-1]
        spread = logits.log_softmax(-1).masked_fill(self.problem.suppressed, float("-inf"))
        total = (self.score.view(-1, 1) + spread).view(blocks, width * vocab)
        top, flat = total.topk(min(2 * k, total.shape[1]), dim=1)
        beam = torch.div(flat, vocab, rounding_mode="floor")
        token = flat - beam * vocab
        ends = (token == EOS) & top.isfinite()
        self._finish(ends & self._among_best(k, top), top=top, beam=beam)
        top = top.masked_fill(token == EOS, float("-inf"))
        top, pick = top.topk(min(k, top.shape[1]), dim=1)
        beam, token = beam.gather(1, pick), token.gather(1, pick)
        offset = torch.arange(blocks, device=beam.device)[:, None] * width
        self.ids = torch.cat([self.ids[(beam + offset).flatten()], token.view(-1, 1)], 1)
        self.score = top
        return self._drop_finished_sources(beam + offset)

    @staticmethod
    def _among_best(k: int, top: Tensor) -> Tensor:
        """Only an ``EOS`` among a source's k best candidates ends a hypothesis."""
        return torch.arange(top.shape[1], device=top.device)[None] < k

    def _finish(self, ends: Tensor, *, top: Tensor, beam: Tensor) -> None:
        width = self.score.shape[1]
        for block, place in ends.nonzero().tolist():
            ids = self.ids[block * width + int(beam[block, place])].tolist()
            self._add_hypothesis(block, ids, float(top[block, place]), finished=True)

    def _add_hypothesis(
        self, block: int, ids: list[int], log_prob: float, *, finished: bool
    ) -> None:
        score = self.config.normalise(log_prob, length=len(ids) + finished)
        self.done[self.live[block]].append(Hypothesis(tuple(ids), score, log_prob, finished))

    def _drop_finished_sources(self, rows: Int[Tensor, "b k"]) -> Int[Tensor, "left"]:
        """Drop the sources that are done, and tell the model which rows go on."""
        best = self.score[:, 0].tolist()
        stay = [
            block for block, log_prob in enumerate(best) if self._is_unfinished(block, log_prob)
        ]
        index = torch.tensor(stay, dtype=torch.long, device=rows.device)
        width = rows.shape[1]
        self.live = [self.live[block] for block in stay]
        self.ids = self.ids.view(len(best), width, -1)[index].flatten(0, 1)
        self.score = self.score[index]
        if stay:
            self.problem.reorder_cache(rows[index].flatten())
        return self.ids[:, -1]

    def _is_unfinished(self, block: int, log_prob: float) -> bool:
        source = self.live[block]
        length, room = self.ids.shape[1], self.max_tokens[source]
        if log_prob == float("-inf"):
            return False
        found = sorted((h.score for h in self.done[source]), reverse=True)
        if len(found) >= self.config.size:
            return False
        if length >= room:
            self._add_unfinished(block)
            return False
        hope = self.config.normalise(
            log_prob, length=room
        )  # log_prob only falls, length only grows
        return len(found) < self.config.n_best or hope > found[self.config.n_best - 1]

    def _add_unfinished(self, block: int) -> None:
        """Out of room: what is alive counts as it is."""
        width = self.score.shape[1]
        for place, log_prob in enumerate(self.score[block].tolist()):
            if log_prob > float("-inf"):
                ids = self.ids[block * width + place].tolist()
                self._add_hypothesis(block, ids, log_prob, finished=False)


SUPPRESSED_TOKENS = (PAD, BOS, UNK, MASK)


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
    for all, ``EOS`` included; ``forbid`` are ids that are never said. Default search: ``Greedy``.
    The answer to a source does not depend on the others in the batch (if the model drops no tokens
    in evaluation).
    """
    if not source.shape[0]:
        return []
    training = model.training
    model.eval()
    try:
        return (search or Greedy())(
            _search_inputs(model, source, tag, max_tokens, tuple(suppress_tokens))
        )
    finally:
        model.train(training)


def _search_inputs(
    model: Transformer,
    source: Tensor,
    tag: Tensor,
    max_tokens: int | Tensor,
    suppress_tokens: tuple[int, ...],
) -> SearchInputs:
    rows = torch.arange(source.shape[0], device=source.device)
    cache = model.init_cache(model.encode(source), rows)
    prompt = tag[:, None] if model.config.encoder.layers else append_tag(source, tag=tag)
    logits = model.step(prompt, cache)
    limit = torch.as_tensor(max_tokens, device=source.device).expand(source.shape[0])
    forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=source.device)
    forbidden[list(suppress_tokens)] = True
    return SearchInputs(
        logits=logits,
        step=lambda ids: model.step(ids[:, None], cache),
        reorder_cache=cache.reorder,
        max_tokens=limit,
        suppressed=forbidden,
    )


def append_tag(source: Int[Tensor, "B S"], *, tag: Int[Tensor, "B"]) -> Int[Tensor, "B S1"]:
    """Put a token after the last real one of each right-padded row."""
    longer = torch.nn.functional.pad(source, (0, 1), value=PAD)
    return longer.scatter(1, (source != PAD).sum(1, keepdim=True), tag[:, None])
