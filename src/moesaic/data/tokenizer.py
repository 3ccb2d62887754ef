"""The tokenizer: text to ids and back without loss, for every script, with a token per language.

Ids are, in order: ``<pad> <s> </s> <unk> <mask>``, a language token such as ``<deu_Latn>`` per
language, 256 bytes, the learned pieces, and ``<unused_i>`` up to exactly ``vocab_size``. A
character outside of the alphabet becomes its UTF-8 bytes (SentencePiece's byte fallback,
arXiv:1808.06226), so that ``decode(encode(text)) == text`` for any text, without ``<unk>``.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.errors import DataError, did_you_mean
from moesaic.core.files import atomic_write
from moesaic.data.batch import PAD

__all__ = ["BOS", "EOS", "MASK", "PAD", "SPECIALS", "UNK", "Tokenizer", "language_token"]

BOS, EOS, UNK, MASK = 1, 2, 3, 4
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")


def language_token(language: str) -> str:
    """Return the language token of a code: ``'deu_Latn' -> '<deu_Latn>'``."""
    return f"<{language}>"


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

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read ``tokenizer.json``. Raises DataError if missing, damaged or not by moesaic."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer file; expected a tokenizer.json")
        try:
            hf_tokenizer = HfTokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a tokenizer.json that can be read ({error})") from error
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

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special and language tokens are skipped."""
        return self._hf_tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


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


def _is_text(text: str) -> bool:
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


def _not_text_error(text: object, error: Exception) -> DataError:
    shown = repr(text)[:60]
    return DataError(
        f"{shown} cannot be encoded: expected Unicode text that UTF-8 can encode ({error})"
    )
