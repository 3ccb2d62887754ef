"""Beam search and greedy search, with n-best answers, early stopping and repetition rules.

A search (``Greedy``, ``Beam``) needs two functions of a model: decode one token per row, and
reorder the rows of its cache.

Letters: B sources, k beam size, R hypotheses (rows in the cache), L tokens generated so far,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from moesaic.core.config import Choice
from moesaic.core.errors import UserError
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.model.repetition import block_repeated_ngrams, penalise_repeated_tokens
from moesaic.ops.block_topk import largest_of_rows

Array = npt.NDArray[Any]
DecodeStep = Callable[[Tensor], Tensor]  # ids [R] -> logits [R, V]
# rows [R'] that are decoded further, k for each of the sources [B'] that stay (None: all stay)
ReorderCache = Callable[[Tensor, Tensor | None], None]
# (source [R] and selected token [R] of each row) -> bool [R], true for rows that end with it
Observer = Callable[[Array, Array], Array]
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
    """The first logits of each source, the model's decoding functions, limits, special tokens.

    ``ends`` are the tokens that end an answer; those in ``suppressed`` are never generated. The
    cache is reordered only if rows move: k rows for each source, those of a source together.
    ``max_tokens`` counts generated tokens, the end included. ``processors`` change the
    log-probabilities before each selection (constrained decoding). What is drawn at random for a
    source depends on its ``row_key`` (None: its index); ``observer`` is called with the tokens of
    each step (both: ``model/sampling.py`` only).
    """

    logits: Float[Tensor, "B V"]
    step: DecodeStep
    reorder_cache: ReorderCache
    max_tokens: Int[Tensor, "B"]
    suppressed: Int[Tensor, "n"]
    ends: tuple[int, ...]
    processors: tuple[LogitsProcessor, ...] = ()
    row_key: Int[Tensor, "B"] | None = None
    observer: Observer | None = None


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
    """The unfinished hypotheses of one call: k rows for each source that is not done.

    Tokens and scores are kept on the host, in numpy: a step waits for the device once, when it
    reads the best continuations of each source.
    """

    def __init__(self, config: Beam, inputs: SearchInputs) -> None:
        self.config, self.inputs = config, inputs
        sources = inputs.logits.shape[0]
        self.finished: list[list[Hypothesis]] = [[] for _ in range(sources)]
        self.sources = np.arange(sources)  # the source of each group of k rows
        self.max_tokens = inputs.max_tokens.cpu().numpy()
        self.has_finished = np.zeros(sources, np.bool_)
        self.ids = np.empty((sources, 1, 0), np.int64)  # [b, k, L]
        self.log_prob = np.zeros((sources, 1), np.float32)  # [b, k]

    def run(self) -> list[list[Hypothesis]]:
        logits = self.inputs.logits
        while True:
            self._extend(logits)
            if not len(self.sources):
                break
            logits = self.inputs.step(self._on_device(self.ids[:, :, -1].reshape(-1)))
        best = self.config.n_best
        return [sorted(found, key=lambda h: -h.score)[:best] for found in self.finished]

    def _extend(self, logits: Float[Tensor, "R V"]) -> None:
        """Append a token to every hypothesis and select the cache's rows."""
        k = self.config.size
        best = self._best_continuations(logits)
        ends = np.isin(best.token, self.inputs.ends)
        # only an end among a source's k best candidates finishes a hypothesis
        for group, column in np.argwhere(ends[:, :k] & np.isfinite(best.log_prob[:, :k])).tolist():
            beam, log_prob = int(best.beam[group, column]), float(best.log_prob[group, column])
            self._add_hypothesis(group, beam, log_prob, finished=True)
        self._keep_where_no_token_is_left(best.log_prob)
        best = best.without(ends).first(k)
        self.ids = np.concatenate(
            [np.take_along_axis(self.ids, best.beam[:, :, None], 1), best.token[:, :, None]], 2
        )
        width, self.log_prob = self.log_prob.shape[1], best.log_prob
        self._drop_finished_sources(best.beam, width=width)

    def _best_continuations(self, logits: Float[Tensor, "R V"]) -> "_Candidates":
        """Return the best continuations of each source: as many that k of them end no answer."""
        groups, count = len(self.sources), (1 + len(self.inputs.ends)) * self.config.size
        found = token_log_prob(
            logits,
            search=self.config,
            inputs=self.inputs,
            ids=self.ids.reshape(logits.shape[0], self.ids.shape[2]),
            source=self.sources.repeat(self.ids.shape[1]),
        )
        top = largest_of_rows(found, count=count)
        total = top.values + self._on_device(self.log_prob).reshape(-1, 1)
        total, column = total.view(groups, -1), top.columns.view(groups, -1)
        found = total.topk(min(count, total.shape[1]), dim=1)
        token = column.gather(1, found.indices)
        of_row = top.columns.shape[1]
        on_host = (_to_host(tensor) for tensor in (*found, token, logits.sum()))
        log_prob, place, token, check = on_host
        if not np.isfinite(check) and not bool(logits.isfinite().all()):
            raise nonfinite_logits(self.ids.shape[2] + 1)
        return _Candidates(log_prob, place // of_row, token)

    def _keep_where_no_token_is_left(self, log_prob: Array) -> None:
        """Keep the present hypotheses of a source none of which can be extended or finished."""
        dead = ~np.isfinite(log_prob).any(axis=1)
        for (group,) in np.argwhere(dead).tolist():
            if not self.finished[self.sources[group]]:
                self._keep_unfinished(group)

    def _keep_unfinished(self, group: int) -> None:
        for beam, value in enumerate(self.log_prob[group].tolist()):
            if value > float("-inf"):
                self._add_hypothesis(group, beam, value, finished=False)

    def _add_hypothesis(self, group: int, beam: int, log_prob: float, *, finished: bool) -> None:
        ids = tuple(self.ids[group, beam].tolist())
        score = self.config.normalise(log_prob, length=len(ids) + finished)
        self.has_finished[self.sources[group]] = True
        self.finished[self.sources[group]].append(Hypothesis(ids, score, log_prob, finished))

    def _drop_finished_sources(self, beam: Array, *, width: int) -> None:
        """Drop the sources that are done, and select the rows of the cache that go on."""
        best, stay = self.log_prob[:, 0], np.ones(len(self.sources), np.bool_)
        # only these can be done: the others have no finished hypothesis
        asked = ~np.isfinite(best) | (self.ids.shape[2] >= self.max_tokens[self.sources])
        asked |= self.has_finished[self.sources]
        for (group,) in np.argwhere(asked).tolist():
            stay[group] = self._continues(group, float(best[group]))
        rows = beam + np.arange(len(best))[:, None] * width
        kept = None
        if not stay.all():
            self.sources, self.ids = self.sources[stay], self.ids[stay]
            self.log_prob, rows = self.log_prob[stay], rows[stay]
            kept = self._on_device(stay.nonzero()[0])
        rows = rows.reshape(-1)
        moved = len(rows) != len(best) * width or (rows != np.arange(len(rows))).any()
        if len(rows) and moved:
            self.inputs.reorder_cache(self._on_device(rows), kept)

    def _continues(self, group: int, log_prob: float) -> bool:
        """Return whether a source is decoded further; at ``max_tokens`` keep what is unfinished."""
        if log_prob == float("-inf"):
            return False
        source = self.sources[group]
        scores = [h.score for h in self.finished[source]]
        length, limit = self.ids.shape[2], int(self.max_tokens[source])
        done = self.config.is_done(scores, log_prob=log_prob, length=length, limit=limit)
        if not done and length >= limit:
            self._keep_unfinished(group)
        return not done and length < limit

    def _on_device(self, array: Array) -> Tensor:
        tensor, device = torch.from_numpy(array), self.inputs.logits.device
        return tensor if device.type == "cpu" else tensor.to(device)


def _to_host(tensor: Tensor) -> Array:
    return (tensor if tensor.device.type == "cpu" else tensor.cpu()).numpy()


class _Candidates(NamedTuple):
    """Continuations of each source, best first: sum of log-probabilities, beam, token; [b, c]."""

    log_prob: Array
    beam: Array
    token: Array

    def without(self, ends: Array) -> "_Candidates":
        """Return the same with those in the mask last, at a probability of zero."""
        if not ends.any():
            return self
        log_prob = np.where(ends, np.float32("-inf"), self.log_prob)
        order = np.argsort(-log_prob, axis=1, kind="stable")
        each = (log_prob, self.beam, self.token)
        return _Candidates(*(np.take_along_axis(array, order, 1) for array in each))

    def first(self, count: int) -> "_Candidates":
        """Return the best ``count``."""
        return _Candidates(*(array[:, :count] for array in self))


def token_log_prob(
    logits: Float[Tensor, "R V"],
    *,
    search: Search,
    inputs: SearchInputs,
    ids: Array,
    source: Array,
) -> Float[Tensor, "R V"]:
    """Return the log-probabilities of the next tokens; -inf where one cannot be selected.

    ``ids`` [R, L] are generated so far, ``source`` [R] is the source of each row: on the host.
    """
    reads_ids = search.no_repeat_ngram_size or search.repetition_penalty != 1
    if not reads_ids and not inputs.processors:
        return _suppress(logits.log_softmax(-1), inputs.suppressed)
    given = torch.from_numpy(ids).to(logits.device)
    logits = penalise_repeated_tokens(logits, ids=given, penalty=search.repetition_penalty)
    found = _suppress(logits.log_softmax(-1), inputs.suppressed)
    found = block_repeated_ngrams(found, ids=given, size=search.no_repeat_ngram_size)
    if inputs.processors:
        of_row = torch.from_numpy(source).to(logits.device)
        for processor in inputs.processors:
            found = processor(given, of_row, found)
    return found


def nonfinite_logits(number: int) -> NonFiniteLogitsError:
    """Return the error of logits from which the generated token ``number`` cannot be selected."""
    return NonFiniteLogitsError(
        f"the model's logits hold NaN or infinity at generated token {number}: expected finite "
        "numbers"
    )


def _suppress(log_prob: Float[Tensor, "R V"], ids: Int[Tensor, "n"]) -> Float[Tensor, "R V"]:
    return log_prob.index_fill_(1, ids, float("-inf"))
