"""The tokenizer: text to ids and back without loss, for every script, with a token per language.

Ids are, in order: ``<pad> <s> </s> <unk> <mask>``, a language token such as ``<deu_Latn>`` per
language, 256 bytes, the learned pieces, and ``<unused_i>`` up to exactly ``vocab_size``. A
character outside of the alphabet becomes its UTF-8 bytes (SentencePiece's byte fallback,
arXiv:1808.06226), so that ``decode(encode(text)) == text`` for any text, without ``<unk>``.

A tokenizer with copy units (``data/copy_units.py``) has two pieces per slot between bytes and
learned pieces. ``encode_with_copies`` uses them; its result restores the text.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.errors import DataError
from moesaic.core.files import atomic_write
from moesaic.data.copy_units import MAX_SLOTS, SlottedText, insert_slots, slot_characters
from moesaic.data.tokenizer_file import read_imported_tokenizer_file, read_tokenizer_file
from moesaic.data.vocabulary import Vocabulary
from moesaic.data.vocabulary_file import RecordedVocabulary, read_vocabulary, write_vocabulary

# the tokens of the roles of a trained vocabulary, in order of their ids from 0 on
SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}


def language_token(language: str) -> str:
    """Return the language token of a code: ``'deu_Latn' -> '<deu_Latn>'``."""
    return f"<{language}>"


def copy_pieces(slots: int) -> tuple[str, ...]:
    """Return the pieces of the slots: alone, and after a space."""
    return tuple(piece for slot in slot_characters(slots) for piece in (slot, " " + slot))


@dataclass(frozen=True, slots=True)
class CopyTokens:
    """The ids of the pieces of copy slots, and the slot of each; both empty without copy units."""

    ids: tuple[int, ...] = ()
    slot_of: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        """Number of slots."""
        return max(self.slot_of, default=-1) + 1


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The ids of a text, with slots for its placeholders, and the text that they stand for."""

    ids: list[int]
    slotted: SlottedText


class Tokenizer:
    """A frozen vocabulary: tokenizers with the same ``fingerprint`` are equal.

    ``recorded`` has the roles of one that moesaic did not train; it needs no tokens of ours.
    """

    def __init__(
        self, hf_tokenizer: HfTokenizer, *, recorded: RecordedVocabulary | None = None
    ) -> None:
        # a special token typed by a user is text
        hf_tokenizer.encode_special_tokens = True
        self._hf_tokenizer, self._recorded = hf_tokenizer, recorded
        known = recorded.vocabulary if recorded else _trained_vocabulary(hf_tokenizer)
        self._row_of = known.id_map
        self._id_of = None if (rows := known.id_map) is None else dict(zip(rows, count()))
        self._vocabulary = replace(known, not_text=self._find_not_text(size=known.size))
        self._languages = recorded.languages if recorded else tuple(known.tags)
        self._copies = self._find_copies()
        unknown = {self._vocabulary.unk}
        self._markers = {*self._vocabulary.suppressed, *self._vocabulary.ends} - unknown

    def with_ends(self, ids: Iterable[int]) -> "Tokenizer":
        """Return the tokenizer of a model that may end a text with several tokens.

        Those that it has no token for are left out. The file of the tokenizer does not have them.
        """
        known = self._vocabulary
        others = tuple(sorted({i for i in ids if i < known.size} - {known.eos}))
        if not others:
            return self
        record = RecordedVocabulary(replace(known, other_ends=others), self._languages)
        return Tokenizer(self._hf_tokenizer, recorded=record)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read ``tokenizer.json``, and the record of its roles if there is one beside it.

        Raises DataError if missing, damaged, or not by moesaic and without a record.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer file; expected a tokenizer.json")
        recorded = read_vocabulary(path)
        if recorded is not None:
            hf_tokenizer = read_imported_tokenizer_file(path)
            _require_size(hf_tokenizer, recorded.vocabulary, path=path)
            return cls(hf_tokenizer, recorded=recorded)
        hf_tokenizer = read_tokenizer_file(path)
        specials = tuple(SPECIALS.values())
        found = tuple(hf_tokenizer.id_to_token(i) for i in range(len(specials)))
        if found != specials:
            raise DataError(
                f"{path}: ids 0 to 4 are {found}, expected {specials}; it was not written by "
                "moesaic: train with it by data.tokenizer=FromFile(path=...)"
            )
        return cls(hf_tokenizer)

    def save(self, path: Path | str) -> None:
        """Write the file that ``load`` and Hugging Face ``tokenizers`` read."""
        path = Path(path)
        atomic_write(path, self._hf_tokenizer.to_str(pretty=True))
        if self._recorded is not None:
            write_vocabulary(self._recorded, tokenizer=path)

    def with_languages(self, codes: Sequence[str]) -> "Tokenizer":
        """Return the tokenizer with a tag for each further language, at the end of the ids.

        Raises DataError for one that has a tag.
        """
        known, extended = self._vocabulary, HfTokenizer.from_str(self._hf_tokenizer.to_str())
        if present := [code for code in codes if code in known.tags]:
            raise DataError(f"the tokenizer has a tag for {', '.join(present)} already")
        first = extended.get_vocab_size()
        extended.add_special_tokens([language_token(code) for code in codes])
        if self._recorded is None:
            return Tokenizer(extended)
        rows = range(first, first + len(codes))
        if known.id_map is not None:
            rows = range(known.size, known.size + len(codes))
        record = replace(
            self._recorded.vocabulary,
            size=max(known.size, rows.stop),
            tags={**known.tags, **dict(zip(codes, rows, strict=True))},
            id_map=None if known.id_map is None else (*known.id_map, *rows),
        )
        languages = (*self._recorded.languages, *codes)
        return Tokenizer(extended, recorded=RecordedVocabulary(record, languages))

    @property
    def vocabulary(self) -> Vocabulary:
        """The number of ids, and which of them are no text."""
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def languages(self) -> tuple[str, ...]:
        """The codes of the languages, in order of their ids where each has a tag."""
        return self._languages

    @property
    def fingerprint(self) -> str:
        """A hash of everything that affects encoding."""
        text = self._hf_tokenizer.to_str()
        if self._recorded is not None:
            text += self._recorded.to_json()
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def copies(self) -> CopyTokens:
        """The tokens of copy slots."""
        return self._copies

    def id_to_token(self, index: int) -> str:
        """Return the string of an id, for display."""
        found = [self._hf_tokenizer.id_to_token(i) for i in self._to_file([index])]
        return (found[0] if found else None) or f"<{index}?>"

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``: pieces and bytes, never special or language tokens."""
        try:
            ids = self._hf_tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise _not_text_error(text, error) from error
        return self._text_only(self._to_model(ids))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts; see ``encode_on_all_cores`` for multithreading."""
        try:
            found = self._hf_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            wrong = next((t for t in texts if not _is_text(t)), "")
            raise _not_text_error(wrong, error) from error
        return [self._text_only(self._to_model(encoding.ids)) for encoding in found]

    def _to_model(self, ids: list[int]) -> list[int]:
        """Return the model's ids of ids of the file."""
        rows = self._row_of
        return ids if rows is None else [rows[i] for i in ids]

    def _to_file(self, ids: Sequence[int]) -> list[int]:
        """Return the file's ids of ids of the model, without those that the file has not."""
        known = self._id_of
        return list(ids) if known is None else [known[i] for i in ids if i in known]

    def _find_not_text(self, *, size: int) -> tuple[int, ...]:
        """Return the ids of special tokens, and those without a token."""
        added = self._hf_tokenizer.get_added_tokens_decoder().items()
        special = self._to_model([i for i, token in added if token.special])
        known = self._to_model(list(self._hf_tokenizer.get_vocab().values()))
        return tuple(sorted({*special, *set(range(size)).difference(known)}))

    def _find_copies(self) -> CopyTokens:
        found = [self._hf_tokenizer.token_to_id(piece) for piece in copy_pieces(MAX_SLOTS)]
        known = {i: index for i, index in enumerate(found) if index is not None}
        return CopyTokens(tuple(self._to_model(list(known.values()))), tuple(i // 2 for i in known))

    def _text_only(self, ids: list[int]) -> list[int]:
        """Return ids without markers that a foreign model found in a text that spells them.

        In the place of a marker are the ids of its characters, so that decoding gives them again.
        """
        if self._recorded is None or self._markers.isdisjoint(ids):
            return ids
        return [i for x in ids for i in (self._spell(x) if x in self._markers else [x])]

    def _spell(self, marker: int) -> list[int]:
        """Return the ids of a marker's characters, or of their bytes, or unknown."""
        unknown = [self._vocabulary.unk] if self._vocabulary.unk is not None else []
        found, find = [], self._hf_tokenizer.token_to_id
        for character in self.id_to_token(marker):
            names = [[character], [f"<0x{byte:02X}>" for byte in character.encode()]]
            spelled = ([i for i in map(find, each) if i is not None] for each in names)
            complete = (i for i, each in zip(spelled, names, strict=True) if len(i) == len(each))
            whole = next(map(self._to_model, complete), unknown)
            found += whole if self._markers.isdisjoint(whole) else unknown
        return found

    def encode_with_copies(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encode several texts, their placeholders as slots: what a model reads and predicts.

        ``decode(ids, slotted)`` is the text again. Without copy units it is ``encode_batch``.
        """
        slotted = [insert_slots(text, slots=self._copies.slots) for text in texts]
        rows = self.encode_batch([found.text for found in slotted])
        return [EncodedText(ids, found) for ids, found in zip(rows, slotted, strict=True)]

    def decode(self, ids: Sequence[int], slotted: SlottedText | None = None) -> str:
        """Return the text of ``ids``; special and language tokens are skipped.

        With ``slotted``, of the text itself or of the source that it is an answer to, slots become
        its placeholders.
        """
        found = self._to_file([int(i) for i in ids])
        text = self._hf_tokenizer.decode(found, skip_special_tokens=True)
        return text if slotted is None else slotted.restore(text)


@contextmanager
def encode_on_all_cores() -> Iterator[None]:
    """Let ``encode_batch`` use every core inside the block; make forking safe again after it.

    The Rust thread pool does not survive a fork: with the variable at ``false``, a forked child
    encodes on its own thread instead of waiting for threads that do not exist.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = before or "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def _trained_vocabulary(hf_tokenizer: HfTokenizer) -> Vocabulary:
    """Return the roles of a tokenizer that moesaic trained, by the names of its tokens."""
    added = sorted(hf_tokenizer.get_added_tokens_decoder().items())
    names = {i: token.content for i, token in added if i >= len(SPECIALS)}
    return Vocabulary.of_roles(
        hf_tokenizer.get_vocab_size(),
        {role: index for index, role in enumerate(SPECIALS)},
        tags={n[1:-1]: i for i, n in names.items() if not n.startswith("<unused_")},
    )


def _require_size(hf_tokenizer: HfTokenizer, vocabulary: Vocabulary, *, path: Path) -> None:
    largest = max(hf_tokenizer.get_vocab().values(), default=-1)
    id_map = vocabulary.id_map
    most = vocabulary.size if id_map is None else len(id_map)
    if largest >= most:
        raise DataError(
            f"{path}: it has ids up to {largest}, but the record beside it {most} ids; "
            "copy both files from one run"
        )


def _is_text(text: str) -> bool:
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


def _not_text_error(text: object, error: Exception) -> DataError:
    shown = repr(text)[:60]
    return DataError(
        f"{shown} cannot be encoded: expected Unicode text that UTF-8 can encode ({error})"
    )
