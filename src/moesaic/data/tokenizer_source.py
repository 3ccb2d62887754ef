"""Tokenizer sources: the family of where a run's tokenizer comes from."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from moesaic.core.config import Choice
from moesaic.data.tokenizer import Tokenizer


class TokenizerSource(Choice):
    """Family: ``TrainedTokenizer`` (on the text of the run) or ``FromFile`` (of another model)."""

    added_tags: tuple[str, ...] = ()
    """Codes of tasks, or of languages without a tag, that get a token each."""

    def make(
        self,
        texts: Mapping[str, Iterable[str]],
        *,
        languages: Sequence[str],
        notify: Callable[[str], None],
    ) -> Tokenizer:
        """Return the tokenizer of a run in ``languages``; ``texts`` are theirs, each read once.

        Raises ConfigError or DataError.
        """
        raise NotImplementedError

    def size(self) -> int | None:
        """Return the number of ids; None where only the tokenizer itself says it."""
        raise NotImplementedError

    def shrink(self, vocab_size: int) -> "TokenizerSource":
        """Return a source for a model whose vocabulary was made small (``verify``)."""
        del vocab_size
        return self
