"""Translator: load a run directory and translate in batches, with beam or greedy search.

Letters: B rows, S source length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from moesaic.checkpoint.trained_directions import TrainedDirections
from moesaic.core.errors import DataError, did_you_mean
from moesaic.corpus.languages import ENGLISH, resolve_language
from moesaic.corpus.text_rules import TextRules, normalise_text
from moesaic.data.batch import Batch
from moesaic.data.collators import (
    Collator,
    DecoderOnlyCollator,
    EncoderDecoderCollator,
    TokenizedSamples,
)
from moesaic.data.language_tag import SOURCE_TAG, TARGET_TAG, TASK_PREFIX, TASK_TAG
from moesaic.data.ragged import Ragged
from moesaic.data.tasks import Translation
from moesaic.data.tokenizer import Tokenizer
from moesaic.model.beam_search import Beam, Greedy, Hypothesis, Search
from moesaic.model.copy_constraint import copy_rules
from moesaic.model.generate import DecodingRules, generate
from moesaic.model.repetition import is_loop
from moesaic.model.transformer import Transformer
from moesaic.moe.routing import Routing
from moesaic.serve.long_text import join_translations
from moesaic.serve.open_run import OpenedRun, open_run
from moesaic.serve.source_text import (
    EncodedPart,
    SourceReader,
    SourceText,
    TranslationLimits,
    require_texts,
)
from moesaic.serve.translation_result import Alternative, TranslationResult

# The experts of one side of a translation: tokens as text and, per MoE layer and token, the
# [expert, weight] pairs that the token was routed to and not dropped from.
TracedSide = dict[str, Any]


def routed_experts(routing: Routing) -> list[list[tuple[int, float]]]:
    """Return the (expert, weight) pairs of every token, largest weight first, without drops."""
    rows: list[list[tuple[int, float]]] = [[] for _ in range(routing.num_tokens)]
    columns = (routing.token.tolist(), routing.expert.tolist(), routing.weight.float().tolist())
    for token, expert, weight in zip(*columns, strict=True):
        if expert < routing.num_experts:
            rows[token].append((expert, weight))
    return [sorted(row, key=lambda pair: -pair[1]) for row in rows]


class Translator:
    """A model with its tokenizer and limits; ``open`` loads one from a run directory."""

    def __init__(
        self,
        model: Transformer,
        *,
        tokenizer: Tokenizer,
        limits: TranslationLimits | None = None,
        text_rules: TextRules | None = None,
        trained: TrainedDirections | None = None,
        collator: Collator | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.limits = (limits or TranslationLimits()).within(model.position.max_positions)
        self.trained = trained
        decoder_only = not model.config.encoder.layers
        usual = DecoderOnlyCollator() if decoder_only else EncoderDecoderCollator()
        self._collator = collator or usual
        self._specials = self._collator.frame.source_specials
        limit = self.limits.source_tokens(specials=self._specials, decoder_only=decoder_only)
        self._reader = SourceReader(tokenizer, limit=limit, rules=text_rules)
        self._rules = DecodingRules(tokenizer.vocabulary)
        self.search: Search = Greedy()

    @classmethod
    def open(
        cls, path: Path | str, *, weights: Path | None = None, device: str = "cpu"
    ) -> "Translator":
        """Load a finished run, or one in progress with the ``weights`` of a checkpoint.

        Raises CheckpointError naming what is missing or does not fit.
        """
        return cls.of(open_run(Path(path), weights=weights, device=device))

    @classmethod
    def of(cls, run: OpenedRun) -> "Translator":
        """Return the translator of an opened run."""
        limits, most = run.limits, run.generation.max_target
        translator = cls(
            run.model,
            tokenizer=run.tokenizer,
            limits=replace(limits, max_target=min(limits.max_target, most)) if most else limits,
            text_rules=run.text_rules,
            trained=run.trained,
            collator=run.collator,
        )
        if settings := run.generation.translation:
            translator.search = Beam.from_dict({"size": 1, **settings})
        return translator

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes of the model."""
        return self.tokenizer.languages

    def normalise(self, text: str) -> str:
        """Return a text as the corpus of the run has it; empty if nothing in it is visible."""
        return self._reader.normalise(text)

    @overload  # a string is a sequence of strings too: the first overload takes it
    def translate(  # pyright: ignore[reportOverlappingOverload]
        self, texts: str, *, source: str, target: str, search: Search | None = None
    ) -> TranslationResult: ...
    @overload
    def translate(
        self, texts: Sequence[str], *, source: str, target: str, search: Search | None = None
    ) -> list[TranslationResult]: ...
    def translate(
        self, texts: str | Sequence[str], *, source: str, target: str, search: Search | None = None
    ) -> TranslationResult | list[TranslationResult]:
        """Translate a text, or each of several; ``source`` and ``target``: any spelling.

        Returns one result for a string, else one result per text, in order. Texts are normalised by
        the rules of the run's corpus; an empty one stays empty; a long one is split into sentences
        (``TranslationLimits.long_text``). Default search: ``Greedy()``, or the one that an imported
        model came with. Batches are sorted by length. Raises DataError for a
        language that the model does not have, or a text that is not a string.
        """
        if isinstance(texts, str):
            return self.translate([texts], source=source, target=target, search=search)[0]
        codes = self._language_code(source), self._language_code(target)
        read = self._reader.read(texts, long_text=self.limits.long_text)
        rows = [part for text in read for part in text.parts]
        answers: list[list[Hypothesis]] = [[] for _ in rows]
        for batch in self._batches(rows):
            generated = self._translate_batch(
                [rows[i] for i in batch], codes=codes, search=search or self.search
            )
            for i, hypotheses in zip(batch, generated, strict=True):
                answers[i] = hypotheses
        found, trained = iter(answers), self.is_trained(*codes)
        return [
            self._to_result(
                text, [next(found) for _ in text.parts], target=codes[1], trained=trained
            )
            for text in read
        ]

    def translate_texts(
        self, texts: Sequence[str], *, source: str, target: str, search: Search | None = None
    ) -> list[str]:
        """Translate and return the best texts only: the signature that ``evaluate`` needs."""
        texts = require_texts(texts)
        results = self.translate(texts, source=source, target=target, search=search)
        return [result.text for result in results]

    def is_trained(self, source: str, target: str) -> bool | None:
        """Return whether the model was trained in a direction; None without a record of it.

        To restore text of one language (denoising) is no translation into it.
        """
        if self.trained is None:
            return None
        codes = self._language_code(source), self._language_code(target)
        return codes in self._trained_pairs()

    def direction_warnings(self, source: str, target: str) -> list[str]:
        """Return what is to be said of a direction that the model was not trained in."""
        if self.is_trained(source, target) is not False:
            return []
        codes = self._language_code(source), self._language_code(target)
        sources = sorted(s for s, t in self._trained_pairs() if t == codes[1])
        if sources:
            return [
                f"the model was not trained to translate from {codes[0]} into {codes[1]}, only "
                f"from {', '.join(sources)}: expect worse answers"
            ]
        targets = ", ".join(sorted({t for _, t in self._trained_pairs()})) or "none"
        return [
            f"the model was never trained to translate into {codes[1]}: its answers are no "
            f"translations (languages that it was trained into: {targets})"
        ]

    def default_source(self, target: str) -> str:
        """Return the source language where none is given: English, or the only one trained.

        Raises DataError where several were trained into ``target`` and English was not.
        """
        code = self._language_code(target)
        sources = sorted(s for s, t in self._trained_pairs() if t == code)
        if not sources or ENGLISH in sources:
            return ENGLISH
        if len(sources) > 1:
            raise DataError(
                f"which language are the texts in? The model was trained into {code} from "
                f"{', '.join(sources)}"
            )
        return sources[0]

    def _trained_pairs(self) -> set[tuple[str, str]]:
        streams = self.trained.streams if self.trained else ()
        return {(s.source, s.target) for s in streams if s.source != s.target and s.rows}

    def batch(
        self, sources: Sequence[str], *, targets: Sequence[str], source: str, target: str
    ) -> Batch:
        """Return sources and given targets as a teacher-forced batch, as in training.

        Languages index ``languages``. Both sides are truncated to what the model was trained with.
        """
        codes = self._language_code(source), self._language_code(target)
        inputs = [text.parts[0].ids if text.parts else () for text in self._reader.read(sources)]
        encoded = self.tokenizer.encode_with_copies(
            [normalise_text(text) for text in require_texts(targets)]
        )
        prompts = self._prompt_lengths(inputs)
        outputs = [
            found.ids[: self.limits.max_target - prompt]
            for prompt, found in zip(prompts, encoded, strict=True)
        ]
        samples = self._samples(inputs, outputs, codes=codes)
        vocabulary = self.tokenizer.vocabulary
        return self._collator.collate(samples, vocabulary=vocabulary).to(self._device)

    def _samples(
        self,
        inputs: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        *,
        codes: tuple[str, str],
    ) -> TokenizedSamples:
        """Return texts as the rows of a loader are, of one direction."""
        zeros, vocabulary = np.zeros(len(inputs), dtype=np.int64), self.tokenizer.vocabulary
        task = TASK_PREFIX + Translation().name
        tags = dict(zip((SOURCE_TAG, TARGET_TAG, TASK_TAG), (*codes, task), strict=True))
        return TokenizedSamples(
            Ragged.from_lists(inputs),
            Ragged.from_lists(outputs),
            task=zeros,
            source_language=zeros + self.languages.index(codes[0]),
            target_language=zeros + self.languages.index(codes[1]),
            tokens={
                name: zeros + vocabulary.tag(code)
                for name, code in tags.items()
                if name in self._collator.frame.names
            },
            key=zeros.astype(np.uint64),
        )

    def _prompt_lengths(self, inputs: Sequence[Sequence[int]]) -> list[int]:
        """Return what the decoder reads before it answers, in tokens."""
        lengths = np.array([len(ids) for ids in inputs], dtype=np.int64)
        return self._collator.lengths(lengths, target=lengths * 0).target.tolist()

    @torch.inference_mode()
    def trace_experts(
        self, text: str, *, source: str, target: str, translation: str | None = None
    ) -> dict[str, TracedSide]:
        """Return the experts of each token of ``text`` and of its translation (made if not given).

        ``source`` is the encoder's side and ``target`` the decoder's; a decoder-only model has
        its prompt on ``target``.
        """
        if translation is None:
            translation = self.translate_texts([text], source=source, target=target)[0]
        batch = self.batch([text], targets=[translation], source=source, target=target)
        records = self.model(batch).records
        sides = {"source": ("encoder", batch.source), "target": ("decoder", batch.target)}
        return {
            side: {
                "tokens": [self.token_text(int(i)) for i in rows.values[0].tolist()],
                "layers": {
                    record.layer: [
                        [[expert, round(weight, 3)] for expert, weight in pairs]
                        for pairs in routed_experts(record.routing)
                    ]
                    for record in records
                    if record.layer.startswith(stack)
                },
            }
            for side, (stack, rows) in sides.items()
        }

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def _language_code(self, name: str) -> str:
        code = resolve_language(name).code
        if code not in self.languages:
            raise DataError(
                f'this model has no language "{name}" ({code}): it has '
                f"{', '.join(self.languages)}{did_you_mean(code, self.languages)}"
            )
        return code

    def _batches(self, rows: Sequence[EncodedPart]) -> Iterator[list[int]]:
        """Group rows, longest first, so that memory peaks at the start."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        while order:
            longest = len(rows[order[0]].ids) + self._specials
            count = max(1, self.limits.batch_tokens // longest)
            yield order[:count]
            order = order[count:]

    def _translate_batch(
        self, rows: Sequence[EncodedPart], *, codes: tuple[str, str], search: Search
    ) -> list[list[Hypothesis]]:
        inputs = [row.ids for row in rows]
        samples = self._samples(inputs, [()] * len(rows), codes=codes)
        batch = self._collator.prompts(samples, vocabulary=self.tokenizer.vocabulary)
        limits = [
            self.limits.new_tokens(len(ids) + self._specials, prompt=prompt)
            for ids, prompt in zip(inputs, self._prompt_lengths(inputs), strict=True)
        ]
        max_tokens = torch.tensor(limits, device=self._device)
        return generate(
            self.model,
            batch.source.to(self._device),
            prompt=batch.target.to(self._device),
            search=search,
            max_tokens=max_tokens,
            rules=copy_rules(
                self._rules,
                self.tokenizer.copies,
                units=[row.slotted.units for row in rows],
                max_tokens=max_tokens,
            ),
        )

    def _to_result(
        self,
        text: SourceText,
        answers: Sequence[list[Hypothesis]],
        *,
        target: str,
        trained: bool | None,
    ) -> TranslationResult:
        """Join the answers to the parts of a text: the best ones, the second ones, and so on."""
        if not text.parts:
            return TranslationResult(text="", score=0.0, trained=trained)
        parts = [row.part for row in text.parts]
        alternatives = []
        for rank in range(max(map(len, answers))):
            chosen = [found[min(rank, len(found) - 1)] for found in answers]
            # a byte token may be a control character or a line end
            texts = [
                row.slotted.restore(normalise_text(self.tokenizer.decode(h.ids)))
                for row, h in zip(text.parts, chosen, strict=True)
            ]
            joined = join_translations(texts, parts=parts, target=target)
            alternatives.append(Alternative(joined, sum(h.score for h in chosen) / len(chosen)))
        best = [found[0] for found in answers]
        return TranslationResult(
            text=alternatives[0].text,
            score=alternatives[0].score,
            alternatives=tuple(alternatives),
            truncated=any(row.truncated for row in text.parts),
            finished=all(h.finished for h in best),
            repeats=any(
                is_loop(h.ids, source=row.ids) for h, row in zip(best, text.parts, strict=True)
            ),
            parts=len(parts),
            forced_cuts=sum(part.boundary != "sentence" for part in parts[:-1]),
            trained=trained,
        )

    def token_text(self, index: int) -> str:
        """Return a token id as text, or by its name if it is not valid text on its own."""
        return token_text(self.tokenizer, index)


def token_text(tokenizer: Tokenizer, index: int) -> str:
    """Return a token id as text, or by its name if it is not valid text on its own.

    The slot of a placeholder is shown as ``<copy_0>``.
    """
    slots = dict(zip(tokenizer.copies.ids, tokenizer.copies.slot_of, strict=True))
    if index in slots:
        return f"<copy_{slots[index]}>"
    text = tokenizer.decode([index])
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(index)
