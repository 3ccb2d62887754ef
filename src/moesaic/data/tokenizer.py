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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.errors import DataError, did_you_mean
from moesaic.core.files import atomic_write
from moesaic.data.copy_units import MAX_SLOTS, SlottedText, insert_slots, slot_characters
from moesaic.data.tokenizer_file import read_tokenizer_file

__all__ = [
    "BOS",
    "EOS",
    "MASK",
    "PAD",
    "SPECIALS",
    "UNK",
    "CopyTokens",
    "EncodedText",
    "Tokenizer",
    "copy_pieces",
    "language_token",
]

PAD, BOS, EOS, UNK, MASK = 0, 1, 2, 3, 4
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")


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
    """A trained vocabulary, frozen: tokenizers with the same ``fingerprint`` are equal."""

    def __init__(self, hf_tokenizer: HfTokenizer) -> None:
        # a special token typed by a user is text
        hf_tokenizer.encode_special_tokens = True
        self._hf_tokenizer = hf_tokenizer
        self._languages = _tagged_languages(hf_tokenizer)
        self._language_token_ids = {
            code: len(SPECIALS) + i for i, code in enumerate(self._languages)
        }
        self._copies = _copy_tokens(hf_tokenizer)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read ``tokenizer.json``. Raises DataError if missing, damaged or not by moesaic."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer file; expected a tokenizer.json")
        hf_tokenizer = read_tokenizer_file(path)
        found = tuple(hf_tokenizer.id_to_token(i) for i in range(len(SPECIALS)))
        if found != SPECIALS:
            raise DataError(
                f"{path}: ids 0 to 4 are {found}, expected {SPECIALS}; "
                "it was not written by moesaic"
            )
        return cls(hf_tokenizer)

    def save(self, path: Path | str) -> None:
        """Write the file that ``load`` and Hugging Face ``tokenizers`` read."""
        atomic_write(Path(path), self._hf_tokenizer.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        return self._hf_tokenizer.get_vocab_size()

    @property
    def languages(self) -> tuple[str, ...]:
        """The codes of languages with a token, in order of their ids."""
        return self._languages

    @property
    def fingerprint(self) -> str:
        """A hash of everything that affects encoding."""
        return hashlib.sha256(self._hf_tokenizer.to_str().encode()).hexdigest()

    @property
    def copies(self) -> CopyTokens:
        """The tokens of copy slots."""
        return self._copies

    def language_token_id(self, language: str) -> int:
        """Return the id of a language token. Raises DataError naming the nearest language."""
        if language not in self._language_token_ids:
            known = ", ".join(self._languages[:12]) + (", ..." if len(self._languages) > 12 else "")
            hint = did_you_mean(language, self._languages)
            raise DataError(f'this tokenizer has no language "{language}"; it has {known}{hint}')
        return self._language_token_ids[language]

    def id_to_token(self, index: int) -> str:
        """Return the string of an id, for display."""
        return self._hf_tokenizer.id_to_token(index) or f"<{index}?>"

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``: pieces and bytes, never special or language tokens."""
        try:
            return self._hf_tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise _not_text_error(text, error) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts; see ``encode_on_all_cores`` for multithreading."""
        try:
            found = self._hf_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            wrong = next((t for t in texts if not _is_text(t)), "")
            raise _not_text_error(wrong, error) from error
        return [encoding.ids for encoding in found]

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
        text = self._hf_tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
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


def _tagged_languages(hf_tokenizer: HfTokenizer) -> tuple[str, ...]:
    added = sorted(hf_tokenizer.get_added_tokens_decoder().items())
    names = [token.content for index, token in added if index >= len(SPECIALS)]
    return tuple(n[1:-1] for n in names if not n.startswith("<unused_"))


def _copy_tokens(hf_tokenizer: HfTokenizer) -> CopyTokens:
    found = [hf_tokenizer.token_to_id(piece) for piece in copy_pieces(MAX_SLOTS)]
    known = [(i // 2, index) for i, index in enumerate(found) if index is not None]
    return CopyTokens(tuple(index for _, index in known), tuple(slot for slot, _ in known))


def _is_text(text: str) -> bool:
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


def _not_text_error(text: object, error: Exception) -> DataError:
    shown = repr(text)[:60]
    return DataError(
        f"{shown} cannot be encoded: expected Unicode text that UTF-8 can encode ({error})"
    )
