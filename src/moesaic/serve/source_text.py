"""Source text: from a user's texts to rows of token ids, as the model was trained to read them.

Texts pass the text rules of the run's corpus; lengths count special tokens, as in training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from moesaic.core.errors import DataError
from moesaic.corpus.text_rules import GeneralText, TextRules
from moesaic.data.copy_units import SlottedText, insert_slots
from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.long_text import LongText, SplitSentences, TextPart, Truncate


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslationLimits:
    """Length limits in tokens, special tokens included, with the meaning of ``LoaderConfig``.

    A source longer than ``max_source`` is read by ``long_text``: split into sentences, or
    truncated. An output has at most ``max_target`` tokens, and at most ``max_length_ratio`` times
    the tokens of its source plus 16. In a decoder-only model ``max_target`` bounds the whole row:
    a source has at most half of it, and its output what is left. ``batch_tokens`` bounds the padded
    source tokens of a batch.
    """

    max_source: int = 256
    max_target: int = 256
    max_length_ratio: float = 3.0
    batch_tokens: int = 8192
    long_text: LongText = field(default_factory=SplitSentences)

    def within(self, positions: int | None) -> "TranslationLimits":
        """Return the limits of a model with so many learned positions; None: any number."""
        if positions is None:
            return self
        return replace(
            self,
            max_source=min(self.max_source, positions),
            max_target=min(self.max_target, positions),
        )

    def source_tokens(self, *, specials: int, decoder_only: bool) -> int:
        """Return how many tokens of text a source may have beside its special ones."""
        most = (self.max_target + 1) // 2 if decoder_only else self.max_source
        return max(1, most - specials)

    def new_tokens(self, source_length: int, *, prompt: int) -> int:
        """Return the limit of an output, its end included.

        It is for a source of so many tokens, and a decoder that has read a prompt of so many.
        """
        room = self.max_target + 1 - prompt
        return max(1, min(room, round(self.max_length_ratio * source_length) + 16))


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """A part of a text with its tokens, without special ones.

    With copy units the part has slots, and ``slotted`` the placeholders that they stand for.
    """

    part: TextPart
    ids: tuple[int, ...]
    truncated: bool
    slotted: SlottedText


@dataclass(frozen=True, slots=True)
class SourceText:
    """A normalised text and the parts that are translated; none if nothing in it is visible."""

    text: str
    parts: tuple[EncodedPart, ...]


class SourceReader:
    """Normalises, splits and encodes texts for one tokenizer and ``limit`` tokens of text."""

    def __init__(self, tokenizer: Tokenizer, *, limit: int, rules: TextRules | None = None) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._rules = rules or GeneralText()

    def normalise(self, text: str) -> str:
        """Return a text as the corpus of the run has it; empty if nothing in it is visible."""
        return self._rules.normalise(text)

    def read(
        self, texts: Iterable[object], *, long_text: LongText | None = None
    ) -> list[SourceText]:
        """Return the texts with their encoded parts. Raises DataError: one that is not a string."""
        normalised = [self.normalise(text) for text in require_texts(texts)]
        slotted = [self._insert_slots(text) for text in normalised]
        lengths = self._count([found.text for found in slotted])
        split = long_text or Truncate()
        parts = [  # a slot is one character: no cut is inside a placeholder
            split.parts(found.text, limit=self._limit, count=self._count)
            if length > self._limit
            else [TextPart(found.text)] * bool(found.text)
            for found, length in zip(slotted, lengths, strict=True)
        ]
        ids = iter(self._tokenizer.encode_batch([p.text for found in parts for p in found]))
        return [
            SourceText(text, tuple(self._encoded(part, next(ids), whole) for part in found))
            for text, whole, found in zip(normalised, slotted, parts, strict=True)
        ]

    def _insert_slots(self, text: str) -> SlottedText:
        return insert_slots(text, slots=self._tokenizer.copies.slots)

    def _count(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer.encode_batch(texts)]

    def _encoded(self, part: TextPart, ids: Sequence[int], whole: SlottedText) -> EncodedPart:
        return EncodedPart(
            part,
            tuple(ids[: self._limit]),
            truncated=len(ids) > self._limit,
            slotted=whole.restrict(part.text),
        )


def require_texts(texts: Iterable[object]) -> list[str]:
    """Return the texts as a list. Raises DataError naming the first that is not a string."""
    if isinstance(texts, bytes | str) or not isinstance(texts, Iterable):
        raise DataError(f"found {texts!r:.60}, expected a list of strings")
    found = []
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(f"text {number} is {text!r:.60}, expected a string")
        found.append(text)
    return found
