"""Beam search and greedy search, with n-best answers, early stopping and repetition rules.

A search (``Greedy``, ``Beam``) needs two functions of a model: decode one token per row, and
reorder the rows of its cache.

Letters: B sources, k beam size, R hypotheses (rows in the cache), L tokens generated so far,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.errors import UserError
from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.data.tokenizer import EOS
from moesaic.model.repetition import block_repeated_ngrams, penalise_repeated_tokens

DecodeStep = Callable[[Tensor], Tensor]  # ids [R] -> logits [R, V]
ReorderCache = Callable[[Tensor], None]  # index [R'] of the rows that are decoded further
# (ids [R, L] generated so far, source [R] of each row, log_prob [R, V]) -> log_prob [R, V]
LogitsProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]


class NonFiniteLogitsError(UserError):
    """The model returned logits that are NaN or infinite: no token can be selected by them."""


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

    ``max_tokens`` counts generated tokens, ``EOS`` included. ``processors`` change the
    log-probabilities before each selection (constrained decoding).
    """

    logits: Float[Tensor, "B V"]
    step: DecodeStep
    reorder_cache: ReorderCache
    max_tokens: Int[Tensor, "B"]
    suppressed: Bool[Tensor, "V"]
    processors: tuple[LogitsProcessor, ...] = ()


class Search(Choice):
    """Family of searches, with the rules on repetition that all of them follow.

    An n-gram of ``no_repeat_ngram_size`` tokens is generated at most once in an answer (0: no
    limit). Logits of tokens already generated are divided by ``repetition_penalty`` (1: none).
    """

    no_repeat_ngram_size: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, gt=0)

    def __call__(self, inputs: SearchInputs) -> list[list[Hypothesis]]:
        """Return the hypotheses of each source, best first. Raises NonFiniteLogitsError."""
        raise NotImplementedError


class Greedy(Search):
    """The most probable token at each step; scores are mean log-probabilities per token."""

    def __call__(self, inputs: SearchInputs) -> list[list[Hypothesis]]:
        return Beam(
            size=1,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            repetition_penalty=self.repetition_penalty,
        )(inputs)


class Beam(Search):
    """Beam search: hypotheses are ranked by ``log_prob / length ** length_penalty``.

    Length counts ``EOS`` (as in fairseq; 0 ranks by the sum). A source is done when it reaches
    ``max_tokens``, when no unfinished hypothesis can still enter its ``n_best``, or by the rule
    ``early_stopping``, with the three values of transformers: ``True``, when ``size`` hypotheses
    are finished (also fairseq's rule); ``False``, when moreover the best unfinished one, scored at
    its present length, is not better than the worst of the best ``size`` finished ones (a
    heuristic: a longer one may still score better); ``"never"``, neither. ``size=1`` is greedy
    search.
    """

    size: int = Field(default=4, ge=1)
    length_penalty: float = Field(default=1.0, ge=0)
    n_best: int = Field(default=1, ge=1)
    early_stopping: bool | Literal["never"] = True

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

    def is_done(self, scores: list[float], *, log_prob: float, length: int, limit: int) -> bool:
        """Return whether a source is done, given its finished ``scores``.

        ``log_prob`` and ``length`` are those of its best unfinished hypothesis.
        """
        best = sorted(scores, reverse=True)
        # an upper bound: log_prob only falls, length only grows
        if len(best) >= self.n_best and best[self.n_best - 1] >= self.normalise(
            log_prob, length=limit
        ):
            return True
        if self.early_stopping == "never" or len(best) < self.size:
            return False
        return self.early_stopping or best[self.size - 1] >= self.normalise(log_prob, length=length)


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
        total = self.log_prob.view(-1, 1) + self._token_log_prob(logits)
        total = total.view(groups, width * vocab)
        top, flat = total.topk(min(2 * k, total.shape[1]), dim=1)
        beam = torch.div(flat, vocab, rounding_mode="floor")
        token = flat - beam * vocab
        # only an EOS among a source's k best candidates finishes a hypothesis
        among_best = torch.arange(top.shape[1], device=top.device)[None] < k
        ends = (token == EOS) & top.isfinite() & among_best
        for group, column in ends.nonzero().tolist():
            row = group * width + int(beam[group, column])
            self._add_hypothesis(group, row, float(top[group, column]), finished=True)
        self._keep_where_no_token_is_left(top)
        top = top.masked_fill(token == EOS, float("-inf"))
        top, pick = top.topk(min(k, top.shape[1]), dim=1)
        beam, token = beam.gather(1, pick), token.gather(1, pick)
        offset = torch.arange(groups, device=beam.device)[:, None] * width
        self.ids = torch.cat([self.ids[(beam + offset).flatten()], token.view(-1, 1)], 1)
        self.log_prob = top
        return self._drop_finished_sources(beam + offset)

    def _token_log_prob(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Return the log-probabilities of the next tokens; -inf where one cannot be selected."""
        if not bool(logits.isfinite().all()):
            raise NonFiniteLogitsError(
                f"the model's logits hold NaN or infinity at generated token "
                f"{self.ids.shape[1] + 1}: expected finite numbers"
            )
        config, inputs = self.config, self.inputs
        logits = penalise_repeated_tokens(logits, ids=self.ids, penalty=config.repetition_penalty)
        found = logits.log_softmax(-1).masked_fill(inputs.suppressed, float("-inf"))
        found = block_repeated_ngrams(found, ids=self.ids, size=config.no_repeat_ngram_size)
        if inputs.processors:
            source = torch.tensor(self.sources, device=logits.device)
            source = source.repeat_interleave(self.log_prob.shape[1])
            for processor in inputs.processors:
                found = processor(self.ids, source, found)
        return found

    def _keep_where_no_token_is_left(self, top: Float[Tensor, "b c"]) -> None:
        """Keep the present hypotheses of a source none of which can be extended or finished."""
        width = self.log_prob.shape[1]
        for group in (~top.isfinite().any(1)).nonzero()[:, 0].tolist():
            if not self.finished[self.sources[group]]:
                self._keep_unfinished(group, width=width)

    def _keep_unfinished(self, group: int, *, width: int) -> None:
        for beam, value in enumerate(self.log_prob[group].tolist()):
            if value > float("-inf"):
                self._add_hypothesis(group, group * width + beam, value, finished=False)

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
        if log_prob == float("-inf"):
            return False
        source = self.sources[group]
        scores = [h.score for h in self.finished[source]]
        length, limit = self.ids.shape[1], self.max_tokens[source]
        done = self.config.is_done(scores, log_prob=log_prob, length=length, limit=limit)
        if not done and length >= limit:
            self._keep_unfinished(group, width=self.log_prob.shape[1])
        return not done and length < limit
