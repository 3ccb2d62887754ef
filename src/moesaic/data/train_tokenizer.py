"""Tokenizer training: BPE or Unigram pieces from a language-balanced sample of lines.

Training is a function of the texts and the config: the sample is chosen by hash, ties are broken by
the pieces themselves, and no random numbers are drawn.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError, DataError
from moesaic.corpus.placeholders import without_placeholders
from moesaic.data.copy_units import MAX_SLOTS, slot_characters
from moesaic.data.tokenizer import (
    SPECIALS,
    Tokenizer,
    copy_pieces,
    encode_on_all_cores,
    language_token,
)
from moesaic.data.tokenizer_source import TokenizerSource
from moesaic.data.vocabulary_file import RecordedVocabulary

BYTE_PIECES = tuple(f"<0x{i:02X}>" for i in range(256))

# Letters and punctuation never share a piece, so no piece equals "<deu_Latn>" or "<0x41>".
# Placeholders come first, so that a frequent one becomes one piece, copied in one step.
_WORD_PATTERN = "|".join(
    (
        r" ?%\(\w+\)[a-zA-Z]",  # %(name)s
        r" ?%(?:\d+\$)?[sdiufxc@]",  # %s %1$d
        r" ?\{\w*\}",  # {} {0} {name}
        r" ?[\p{L}\p{M}\u200c\u200d]+",  # joiners are part of words in Indic scripts and Persian
        r" ?\p{N}",  # digits one by one: numbers are copied, not memorised
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s+(?!\S)",
        r"\s",
    )
)


@dataclass(frozen=True, slots=True)
class LearnedPieces:
    """The result of training: pieces in id order, with their merges or scores."""

    names: tuple[str, ...]
    merges: tuple[tuple[str, str], ...] = ()
    scores: tuple[float, ...] = ()

    def with_copies(self, slots: int) -> "LearnedPieces":
        """Add the pieces of copy slots; a space before a slot always joins it."""
        names = copy_pieces(slots)
        return LearnedPieces(
            (*self.names, *names),
            merges=(*((" ", slot) for slot in slot_characters(slots)), *self.merges),
            scores=(*self.scores, *(0.0 for _ in names)),
        )


class TokenizerAlgorithm(Choice):
    """A subword algorithm. The order of the vocabulary is the same for all."""

    def train(self, lines: Iterable[str], *, size: int, alphabet: Sequence[str]) -> LearnedPieces:
        raise NotImplementedError

    def build_model(self, vocabulary: Sequence[str], *, pieces: LearnedPieces) -> models.Model:
        raise NotImplementedError


class BPE(TokenizerAlgorithm):
    """Byte-pair encoding over characters (Sennrich et al. 2016, arXiv:1508.07909)."""

    min_frequency: int = Field(default=2, ge=1)
    """A pair seen less often is not merged."""

    max_piece_length: int = Field(default=16, ge=2)
    """Longest piece, in characters."""

    def train(self, lines: Iterable[str], *, size: int, alphabet: Sequence[str]) -> LearnedPieces:
        hf_tokenizer = _with_word_splitter(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=self.min_frequency,
            max_token_length=self.max_piece_length,
            initial_alphabet=list(alphabet),
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        hf_tokenizer.train_from_iterator(lines, trainer)
        # two merges may form the same piece: the vocabulary has it once
        order = sorted(hf_tokenizer.get_vocab().items(), key=lambda item: item[1])
        return LearnedPieces(
            tuple(name for name, _ in order),
            merges=tuple((a, b) for a, b in _model_state(hf_tokenizer)["merges"]),
        )

    def build_model(self, vocabulary: Sequence[str], *, pieces: LearnedPieces) -> models.Model:
        ids = {name: i for i, name in enumerate(vocabulary)}
        return models.BPE(
            vocab=ids, merges=list(pieces.merges), unk_token=SPECIALS["unk"], byte_fallback=True
        )


class Unigram(TokenizerAlgorithm):
    """The most probable segmentation under a unigram model (Kudo 2018, arXiv:1804.10959)."""

    max_piece_length: int = Field(default=16, ge=2)
    """Longest piece, in characters."""

    def train(self, lines: Iterable[str], *, size: int, alphabet: Sequence[str]) -> LearnedPieces:
        hf_tokenizer = _with_word_splitter(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size + len(SPECIALS),
            max_piece_length=self.max_piece_length,
            initial_alphabet=list(alphabet),
            unk_token=SPECIALS["unk"],
            special_tokens=[SPECIALS["unk"]],
            show_progress=False,
        )
        keep = frozenset(alphabet)
        hf_tokenizer.train_from_iterator(
            (_restrict_to_alphabet(line, keep) for line in lines), trainer
        )
        scores = {
            n: round(s, 6) for n, s in _model_state(hf_tokenizer)["vocab"] if keep.issuperset(n)
        }
        floor = min(scores.values(), default=0.0) - 1.0
        scores |= {c: floor for c in alphabet if c not in scores}
        rest = sorted((n for n in scores if n not in keep), key=lambda n: (-scores[n], n))
        names = (*alphabet, *rest[: size - len(alphabet)])
        return LearnedPieces(names, scores=tuple(scores[n] for n in names))

    def build_model(self, vocabulary: Sequence[str], *, pieces: LearnedPieces) -> models.Model:
        known = dict(zip(pieces.names, pieces.scores, strict=True))
        # special, byte and unused tokens never match a word, so their score is never used
        floor = min(pieces.scores, default=0.0) - 1.0
        scored = [(name, known.get(name, floor)) for name in vocabulary]
        return models.Unigram(
            vocab=scored, unk_id=vocabulary.index(SPECIALS["unk"]), byte_fallback=True
        )


class TrainedTokenizer(TokenizerSource):
    """A tokenizer of exactly ``vocab_size`` ids, trained on the text of the run."""

    algorithm: TokenizerAlgorithm = BPE()
    vocab_size: int = Field(default=8000, ge=1)
    sample_lines: int = Field(default=400_000, ge=1)
    """Lines of the training sample, over all languages."""

    temperature: float = Field(default=5.0, ge=1)
    """A language's share of the lines is size^(1/temperature)."""

    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    """Share of characters that are in the alphabet, not byte-encoded."""

    max_alphabet_share: float = Field(default=0.5, gt=0, le=1)
    """Largest share of the pieces that single characters may take."""

    copy_units: int = Field(default=0, ge=0, le=MAX_SLOTS)
    """Distinct placeholders, tags and URLs of a text that are copied, a token each; 0: as text."""

    def make(
        self,
        texts: Mapping[str, Iterable[str]],
        *,
        languages: Sequence[str],
        notify: Callable[[str], None],
    ) -> Tokenizer:
        notify(f"training a tokenizer of {self.vocab_size:,} ids")
        return train_tokenizer(texts, languages, self)

    def size(self) -> int:
        return self.vocab_size

    def shrink(self, vocab_size: int) -> "TrainedTokenizer":
        return self.replace(vocab_size=vocab_size)


def train_tokenizer(
    texts: Mapping[str, Iterable[str]], languages: Sequence[str], config: TrainedTokenizer
) -> Tokenizer:
    """Train a tokenizer on ``texts`` (language code -> lines, each read once).

    ``languages`` get a token each, in this order, even without text, and ``added_tags`` after them.
    Raises ConfigError when ``vocab_size`` is too small for any piece, DataError when there is no
    text.
    """
    copies, tags = copy_pieces(config.copy_units), (*languages, *config.added_tags)
    fixed = (
        *SPECIALS.values(),
        *map(language_token, tags),
        *BYTE_PIECES,
        *copies,
    )
    if len(set(tags)) != len(tags):
        raise ConfigError([f"languages and added tags: found one twice in {', '.join(tags)}"])
    num_pieces = config.vocab_size - len(fixed)
    if num_pieces < 1:
        raise ConfigError(
            [
                f"data.tokenizer.vocab_size: found {config.vocab_size}, expected at least "
                f"{len(fixed) + 1}: {len(SPECIALS)} special tokens, {len(tags)} language "
                f"tokens, {len(BYTE_PIECES)} bytes, {len(copies)} copy pieces and one piece"
            ]
        )
    if copies:
        texts = {code: map(_plain_text, lines) for code, lines in texts.items()}
    sample = balanced_lines(texts, lines=config.sample_lines, temperature=config.temperature)
    if not sample:
        raise DataError("no text to train a tokenizer on: every language given is empty")
    alphabet = _alphabet(sample, config=config, num_pieces=num_pieces)
    with encode_on_all_cores():
        pieces = config.algorithm.train(_repeated_lines(sample), size=num_pieces, alphabet=alphabet)
    unused = (f"<unused_{i}>" for i in range(num_pieces - len(pieces.names)))
    vocabulary = (*fixed, *pieces.names, *unused)
    model = config.algorithm.build_model(vocabulary, pieces=pieces.with_copies(config.copy_units))
    hf_tokenizer = _with_word_splitter(model, slots=config.copy_units)
    special = [
        name for name in vocabulary if name in SPECIALS.values() or name.startswith("<unused_")
    ]
    language_tokens = [language_token(code) for code in tags]
    hf_tokenizer.add_special_tokens(
        [AddedToken(n, special=True, normalized=False) for n in (*special, *language_tokens)]
    )
    tokenizer = Tokenizer(hf_tokenizer)
    if not config.added_tags:
        return tokenizer
    recorded = RecordedVocabulary(tokenizer.vocabulary, tuple(languages))
    return Tokenizer(hf_tokenizer, recorded=recorded)


def balanced_lines(
    texts: Mapping[str, Iterable[str]], *, lines: int, temperature: float
) -> list[tuple[str, int]]:
    """Return (line, repetitions): a language gets a share ``size^(1/temperature)`` of ``lines``.

    Lines are distinct within a language and chosen by hash. The lines of a language with fewer
    than its share are repeated; size is the number of distinct lines (a k-minimum-values estimate
    if there are more than ``lines``).
    """
    kept = {code: _sample_by_hash(iterable, lines) for code, iterable in sorted(texts.items())}
    kept = {code: found for code, found in kept.items() if found.lines}
    powers = {code: found.distinct ** (1 / temperature) for code, found in kept.items()}
    # filling a larger budget with repetitions has no effect but time
    lines = min(lines, 2 * sum(len(found.lines) for found in kept.values()))
    result: list[tuple[str, int]] = []
    for code, found in kept.items():
        quota = max(1, round(lines * powers[code] / sum(powers.values())))
        times, rest = divmod(quota, len(found.lines))
        counted = ((line, times + (i < rest)) for i, line in enumerate(found.lines))
        result += [(line, n) for line, n in counted if n]
    return result


@dataclass(frozen=True, slots=True)
class _LineSample:
    lines: list[str]
    distinct: float


def _sample_by_hash(texts: Iterable[str], count: int) -> _LineSample:
    """Return the ``count`` distinct texts with the smallest hashes, in hash order."""
    heap: list[tuple[int, str]] = []
    keys: set[int] = set()
    for text in texts:
        key = int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest())
        if not text or key in keys or (len(heap) == count and key >= -heap[0][0]):
            continue
        keys.add(key)
        if len(heap) < count:
            heapq.heappush(heap, (-key, text))
        else:
            keys.discard(-heapq.heapreplace(heap, (-key, text))[0])
    full = len(heap) == count and count > 1
    distinct = (count - 1) / (-heap[0][0] / 2**64) if full else float(len(heap))
    return _LineSample([text for _, text in sorted(heap, reverse=True)], distinct)


def _alphabet(
    sample: Sequence[tuple[str, int]], *, config: TrainedTokenizer, num_pieces: int
) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for line, times in sample:
        for character in line:
            counts[character] += times
    counts[" "] += 1
    total, seen, found = sum(counts.values()), 0, []
    limit = max(1, int(num_pieces * config.max_alphabet_share))
    # the space is always in the alphabet: every text begins with one
    order = sorted(counts.items(), key=lambda item: (item[0] != " ", -item[1], item[0]))
    for character, count in order:
        if len(found) == limit or seen >= config.character_coverage * total:
            break
        found.append(character)
        seen += count
    return tuple(found)


def _repeated_lines(sample: Sequence[tuple[str, int]]) -> Iterator[str]:
    for line, times in sample:
        for _ in range(times):
            yield line


def _restrict_to_alphabet(line: str, keep: frozenset[str]) -> str:
    return line if keep.issuperset(line) else "".join(c if c in keep else "\n" for c in line)


def _plain_text(text: str) -> str:
    """Return a line without placeholders: with copy units no piece is spent on them."""
    return " ".join(without_placeholders(text).split())


def _with_word_splitter(model: models.Model, *, slots: int = 0) -> HfTokenizer:
    """Return a tokenizer of a model with the word splitter, and a decoder that inverts it.

    Every text gets one leading space, so that a word has the same pieces at the start and in the
    middle; the decoder removes exactly that one.
    """
    copies = " ?[" + "".join(slot_characters(slots)) + "]|" if slots else ""
    pattern = copies + _WORD_PATTERN
    hf_tokenizer = HfTokenizer(model)
    hf_tokenizer.normalizer = normalizers.Prepend(" ")
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    hf_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return hf_tokenizer


def _model_state(hf_tokenizer: HfTokenizer) -> dict[str, Any]:
    return json.loads(hf_tokenizer.to_str())["model"]
