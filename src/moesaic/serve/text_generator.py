"""Text generator: load a decoder-only run and continue prompts, with streaming and stop strings.

Letters: B prompts, R answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch

from moesaic.core.errors import DataError, listed
from moesaic.corpus.languages import ENGLISH, UNDETERMINED, resolve_language
from moesaic.corpus.text_rules import GeneralText, TextRules
from moesaic.data.batch import InputRows
from moesaic.data.collators import Collator, DecoderOnlyCollator
from moesaic.data.language_tag import TARGET_TAG
from moesaic.data.tokenizer import Tokenizer
from moesaic.model.beam_search import Array, Hypothesis
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.sampling import Sample
from moesaic.model.transformer import Transformer
from moesaic.serve.open_run import OpenedRun, open_run
from moesaic.serve.source_text import require_texts
from moesaic.serve.text_stream import TextStream

_ROWS = 64  # answers that are generated together

TextPiece = Callable[[int, str], object]
"""Called with the number of an answer and its next piece of text, whole characters only."""


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """An answer: its text, without the prompt and the stop string.

    ``ended`` is ``end`` (the model ended the text), ``stop`` (a stop string) or ``length``.
    ``log_prob`` is the sum over its tokens. ``skipped`` tokens at the beginning of the prompt were
    left out, because the model has no positions for them.
    """

    prompt: str
    text: str
    ended: Literal["end", "stop", "length"]
    num_tokens: int
    log_prob: float
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class TextLimits:
    """At most ``max_tokens`` tokens of an answer, and the strings that it ends before."""

    max_tokens: int = 200
    stop: tuple[str, ...] = ()


class TextGenerator:
    """A decoder-only model with its tokenizer; ``open`` loads one from a run directory."""

    def __init__(
        self,
        model: Transformer,
        *,
        tokenizer: Tokenizer,
        text_rules: TextRules | None = None,
        collator: Collator | None = None,
        window: int = 512,
    ) -> None:
        """``window`` is the length of the rows that the model was trained on.

        Raises DataError for a model with an encoder.
        """
        if model.config.encoder.layers:
            raise DataError(
                "this model has an encoder: it translates, and does not continue texts "
                "(`moesaic translate RUN --to LANGUAGE`)"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.window = window
        self._text_rules = text_rules or GeneralText()
        self._frame = (collator or DecoderOnlyCollator()).frame
        self.search, self.limits = Sample(), TextLimits()

    @classmethod
    def open(
        cls, path: Path | str, *, weights: Path | None = None, device: str = "cpu"
    ) -> "TextGenerator":
        """Load a finished run, or one in progress with the ``weights`` of a checkpoint.

        Raises CheckpointError naming what is missing or does not fit, DataError for a run that is
        no language model.
        """
        return cls.of(open_run(Path(path), weights=weights, device=device))

    @classmethod
    def of(cls, run: OpenedRun) -> "TextGenerator":
        """Return the generator of an opened run. Raises DataError: no language model."""
        generator = cls(
            run.model,
            tokenizer=run.tokenizer,
            text_rules=run.text_rules,
            collator=run.collator,
            window=run.limits.max_target,
        )
        generator.search = Sample.from_dict(dict(run.generation.texts))
        generator.limits = TextLimits(run.generation.max_tokens or generator.limits.max_tokens)
        return generator

    @overload  # a string is a sequence of strings too: the first overload takes it
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompts: str,
        *,
        search: Sample | None = None,
        limits: TextLimits | None = None,
        language: str | None = None,
        on_text: TextPiece | None = None,
    ) -> GeneratedText: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str],
        *,
        search: Sample | None = None,
        limits: TextLimits | None = None,
        language: str | None = None,
        on_text: TextPiece | None = None,
    ) -> list[GeneratedText]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        search: Sample | None = None,
        limits: TextLimits | None = None,
        language: str | None = None,
        on_text: TextPiece | None = None,
    ) -> GeneratedText | list[GeneratedText]:
        """Continue a prompt, or each of several; an empty one begins a new text.

        Returns one answer for a string, else one per prompt, in order. Prompts are normalised by
        the rules of the run's corpus. ``language`` is what the text is in, any spelling; it may be
        left out where the model has one, English, or the undetermined one. ``on_text`` is called
        with each piece of an answer as soon as it is certain. Default: ``Sample()``, with the
        settings that an imported model came with. An answer
        depends on its prompt, its number and the seed, not on the other prompts: a prompt given
        several times has as many answers.

        Raises DataError for a language that the model does not have, or a prompt that is no string.
        """
        if isinstance(prompts, str):
            return self.generate(
                [prompts], search=search, limits=limits, language=language, on_text=on_text
            )[0]
        request = _Request(search or self.search, limits or self.limits, on_text)
        rows = self._encode(require_texts(prompts), limits=request.limits, language=language)
        numbered = list(enumerate(rows))
        return [
            answer
            for start in range(0, len(numbered), _ROWS)
            for answer in self._continue(numbered[start : start + _ROWS], request)
        ]

    def normalise(self, text: str) -> str:
        """Return a text as the corpus of the run has it; empty if nothing in it is visible."""
        return self._text_rules.normalise(text)

    @property
    def end_token(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.vocabulary.eos

    def begin_tokens(self, language: str | None) -> tuple[int, ...]:
        """Return the tokens that a text begins with. Raises DataError: the language is unclear."""
        vocabulary, names = self.tokenizer.vocabulary, self._frame.prompt
        return tuple(
            vocabulary.tag(self._language_code(language))
            if name == TARGET_TAG
            else vocabulary.role(name, needed_by="the beginning of a text")
            for name in names
        )

    def _language_code(self, language: str | None) -> str:
        known = self.tokenizer.languages
        if language is not None:
            return resolve_language(language).code
        usual = known if len(known) == 1 else [c for c in (UNDETERMINED, ENGLISH) if c in known]
        if not usual:
            raise DataError(
                f"which language is the text in? The model has {listed(known)} (--in LANGUAGE)"
            )
        return usual[0]

    def _encode(
        self, prompts: Sequence[str], *, limits: TextLimits, language: str | None
    ) -> "list[_Prompt]":
        """Return the tokens of prompts; of a long one the last that leave room for an answer."""
        begin = self.begin_tokens(language)
        texts = [self._text_rules.normalise_beginning(prompt) for prompt in prompts]
        encoded = self.tokenizer.encode_batch(texts)
        most = self.model.position.max_positions
        room = max(map(len, encoded), default=0)
        if most is not None:
            room = max(1, most + 1 - len(begin) - min(limits.max_tokens, most // 2))
        before_text = begin if self._frame.text_start is None else ()
        return [
            _Prompt(text, (*(before_text if ids else begin), *ids[-room:]), max(0, len(ids) - room))
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _continue(
        self, prompts: "Sequence[tuple[int, _Prompt]]", request: "_Request"
    ) -> Iterator[GeneratedText]:
        """Yield the answers to some of the prompts, each with its number."""
        answers = _Answers(self.tokenizer, prompts, request)
        device = self.model.device
        rows = [prompt.ids for _, prompt in prompts]
        found = generate(
            self.model,
            InputRows.empty(len(rows), device=device),
            prompt=InputRows.from_lists(rows, device=device),
            search=request.search,
            max_tokens=request.limits.max_tokens,
            rules=DecodingRules(
                self.tokenizer.vocabulary,
                self.tokenizer.copies.ids,
                row_key=torch.tensor([number for number, _ in prompts], device=device),
                observer=answers.observe,
            ),
        )
        yield from answers.finish([hypotheses[0] for hypotheses in found])


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    ids: tuple[int, ...]
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class _Request:
    search: Sample
    limits: TextLimits
    on_text: TextPiece | None


class _Answers:
    """The texts of the answers to some prompts, while they are generated."""

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[tuple[int, _Prompt]], request: _Request
    ) -> None:
        self._prompts, self._on_text = prompts, request.on_text
        self._streams = [
            TextStream(tokenizer, prompt=prompt.ids, stop=request.limits.stop)
            for _, prompt in prompts
        ]
        self._texts: list[list[str]] = [[] for _ in prompts]

    def observe(self, row: Array, token: Array) -> Array:
        """Add a token to each of the rows; true for those that a stop string ends."""
        for r, t in zip(row.tolist(), token.tolist(), strict=True):
            self._add(r, self._streams[r].add(t))
        return np.array([self._streams[r].stopped for r in row.tolist()], dtype=np.bool_)

    def finish(self, found: Sequence[Hypothesis]) -> Iterator[GeneratedText]:
        """Yield the whole answers, in order."""
        for row, (hypothesis, (_, prompt)) in enumerate(zip(found, self._prompts, strict=True)):
            stream = self._streams[row]
            self._add(row, stream.finish())
            yield GeneratedText(
                prompt=prompt.text,
                text="".join(self._texts[row]),
                ended="stop" if stream.stopped else "end" if hypothesis.finished else "length",
                num_tokens=len(hypothesis.ids),
                log_prob=hypothesis.log_prob,
                skipped=prompt.skipped,
            )

    def _add(self, row: int, piece: str) -> None:
        if piece:
            self._texts[row].append(piece)
            if self._on_text is not None:
                self._on_text(self._prompts[row][0], piece)
