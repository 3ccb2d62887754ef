"""Selection: a corpus as a run sees it, cut down to some of its languages.

Prepare: from a run's corpus to its tokenizer and shards, each made once and by one rank.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import ConfigError, did_you_mean
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Pair, Text
from moesaic.data.token_shard_writer import cached_shards
from moesaic.data.token_shards import TokenShards
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import train_tokenizer
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.distributed.world import World
from moesaic.train.run import Run


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


Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What training reads; the same on every rank."""

    tokenizer: Tokenizer
    shards: TokenShards


def prepare_data(run: Run, *, run_dir: RunDir, world: World, notify: Notify) -> PreparedData:
    """Build or open the corpus, then the run directory's tokenizer, then the cached shards.

    Rank 0 works and the others wait, so all must see the same files. Collective. Raises DataError
    or ConfigError.
    """

    def work() -> str:
        notify("opening the corpus")
        chosen = CorpusSubset(run.corpus.open(), languages=run.languages)
        tokenizer = _load_or_train_tokenizer(run, corpus=chosen, run_dir=run_dir, notify=notify)
        notify("opening the token shards (they are written the first time)")
        return str(cached_shards(chosen, tokenizer=tokenizer).path)

    shards = run_on_rank0(world, work)
    return PreparedData(Tokenizer.load(run_dir.tokenizer), TokenShards.open(Path(shards)))


def _load_or_train_tokenizer(
    run: Run, *, corpus: CorpusSubset, run_dir: RunDir, notify: Notify
) -> Tokenizer:
    if run_dir.tokenizer.is_file():
        tokenizer = Tokenizer.load(run_dir.tokenizer)
        _check_tokenizer(tokenizer, run=run, corpus=corpus, path=run_dir.tokenizer)
        return tokenizer
    notify(f"training a tokenizer of {run.tokenizer.vocab_size:,} ids")
    texts = {
        code: (text.text for text in corpus.iter_texts(code, split="train"))
        for code in corpus.languages
    }
    tokenizer = train_tokenizer(texts, languages=corpus.languages, config=run.tokenizer)
    tokenizer.save(run_dir.tokenizer)
    return tokenizer


def _check_tokenizer(tokenizer: Tokenizer, *, run: Run, corpus: CorpusSubset, path: Path) -> None:
    problems = []
    if tokenizer.vocab_size != run.tokenizer.vocab_size:
        problems.append(
            f"tokenizer.vocab_size: {path} has {tokenizer.vocab_size} ids, the run asks for "
            f"{run.tokenizer.vocab_size}; remove the file to train another"
        )
    lacking = [code for code in corpus.languages if code not in tokenizer.languages]
    if lacking:
        problems.append(
            f"languages: {path} has no tag for {', '.join(lacking)}; remove it to train another"
        )
    if problems:
        raise ConfigError(problems)
