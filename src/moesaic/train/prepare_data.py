"""Data preparation: from a run's corpus to its tokenizer and token shards, made once by rank 0."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import ConfigError, did_you_mean
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Text
from moesaic.corpus.text_rules import write_text_rules
from moesaic.data.token_shard_writer import cached_shards
from moesaic.data.token_shards import TokenShards
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import train_tokenizer
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.distributed.world import World
from moesaic.train.find_corpus import open_run_corpus
from moesaic.train.run import Run

Notify = Callable[[str], None]


@dataclass(frozen=True)
class CorpusSubset(Corpus):
    """The part of a corpus in some of its languages (sorted codes)."""

    selected: tuple[str, ...] = ()

    @classmethod
    def of(cls, corpus: Corpus, *, languages: Sequence[str]) -> "CorpusSubset":
        """Select ``languages`` in any spelling; empty means all. Raises ConfigError."""
        known = corpus.languages
        codes = [resolve_language(text).code for text in languages] or known
        missing = [code for code in codes if code not in known]
        if missing:
            raise ConfigError(
                f"languages: the corpus {corpus.name} has no {code}; it has "
                f"{', '.join(known)}{did_you_mean(code, known)}"
                for code in missing
            )
        return cls(corpus.path, corpus.manifest, tuple(sorted(set(codes))))

    @property
    def languages(self) -> tuple[str, ...]:
        return self.selected

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """Translation directions between selected languages."""
        selected = set(self.selected)
        return tuple(d for d in super().directions if selected.issuperset(d))

    @property
    def fingerprint(self) -> str:
        """Hash of the corpus and the selected languages."""
        text = " ".join((super().fingerprint, *self.selected))
        return hashlib.sha256(text.encode()).hexdigest()

    def iter_texts(self, code: str, *, split: str = "train") -> Iterator[Text]:
        """Yield the texts of a language, also from pairs with languages that are not selected."""
        return Corpus(self.path, self.manifest).iter_texts(code, split=split)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenizer, token shards, and which corpus they are of; the same on every rank."""

    tokenizer: Tokenizer
    shards: TokenShards
    corpus_name: str = ""
    corpus_fingerprint: str = ""

    def facts(self) -> dict[str, str]:
        """Return the fingerprints of what every rank must read."""
        return {
            "fingerprint of the tokenizer": self.tokenizer.fingerprint,
            "fingerprint of the token shards": self.shards.fingerprint,
        }


def prepare_data(run: Run, *, run_dir: RunDir, world: World, notify: Notify) -> PreparedData:
    """Build or open the corpus, then the run directory's tokenizer, then the cached shards.

    Rank 0 does the work and the others wait, so all ranks need the same file system. Collective.
    Raises DataError or ConfigError.
    """

    def work() -> dict[str, str]:
        notify("opening the corpus")
        whole = open_run_corpus(run.corpus, run_dir=run_dir)
        corpus = CorpusSubset.of(whole, languages=run.languages)
        for sentence in corpus.describe_empty_splits():
            notify(sentence)
        write_text_rules(run_dir.text_rules, corpus.text_rules)
        tokenizer = _load_or_train_tokenizer(run, corpus=corpus, run_dir=run_dir, notify=notify)
        notify("opening the token shards (they are written the first time)")
        shards = cached_shards(corpus, tokenizer=tokenizer).path
        return {"shards": str(shards), "corpus": whole.name, "fingerprint": whole.fingerprint}

    made = run_on_rank0(world, work)
    return PreparedData(
        Tokenizer.load(run_dir.tokenizer),
        TokenShards.open(Path(made["shards"])),
        corpus_name=made["corpus"],
        corpus_fingerprint=made["fingerprint"],
    )


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
            f"tokenizer.vocab_size: {path} has {tokenizer.vocab_size} ids, the run config has "
            f"{run.tokenizer.vocab_size}; remove the file to train another"
        )
    missing = [code for code in corpus.languages if code not in tokenizer.languages]
    if missing:
        problems.append(
            f"languages: {path} has no tag for {', '.join(missing)}, but for "
            f"{', '.join(tokenizer.languages)}; {run.initial_weights.way_out}"
        )
    if problems:
        raise ConfigError(problems)
