"""Selection: a corpus as a run sees it, cut down to some of its languages."""

import hashlib
from collections.abc import Iterator, Sequence

from moesaic.core.errors import ConfigError, did_you_mean
from moesaic.data.corpus import Corpus
from moesaic.data.languages import resolve_language
from moesaic.data.pair import Pair, Text


class CorpusSubset:
    """What the tokenizer and the shards of a run are made of. Languages are sorted codes."""

    def __init__(self, corpus: Corpus, *, languages: Sequence[str]) -> None:
        """Choose ``languages`` in any spelling; none means all. Raises ConfigError."""
        self.corpus = corpus
        known = corpus.languages
        codes = [resolve_language(text).code for text in languages] or known
        missing = [code for code in codes if code not in known]
        if missing:
            raise ConfigError(
                f"languages: the corpus {corpus.name} has no {code}; it has "
                f"{', '.join(known)}{did_you_mean(code, known)}"
                for code in missing
            )
        self.languages: tuple[str, ...] = tuple(sorted(set(codes)))

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """The corpus's directions between chosen languages."""
        chosen = set(self.languages)
        return tuple(d for d in self.corpus.directions if chosen.issuperset(d))

    @property
    def fingerprint(self) -> str:
        """A hash of all that is chosen."""
        text = " ".join((self.corpus.fingerprint, *self.languages))
        return hashlib.sha256(text.encode()).hexdigest()

    def iter_pairs(self, source: str, target: str, *, split: str) -> Iterator[Pair]:
        return self.corpus.iter_pairs(source, target, split=split)

    def iter_texts(self, code: str, *, split: str) -> Iterator[Text]:
        return self.corpus.iter_texts(code, split=split)
