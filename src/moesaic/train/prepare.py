"""Prepare: from a run's corpus to its tokenizer and shards, each made once and by one rank."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.rundir import RunDir
from moesaic.core.errors import ConfigError
from moesaic.data.shards import TokenShards
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.train_tokenizer import train_tokenizer
from moesaic.data.write_shards import cached_shards
from moesaic.dist.first import run_on_rank0
from moesaic.dist.world import World
from moesaic.train.run import Run
from moesaic.train.selection import CorpusSubset

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


def _load_or_train_tokenizer(run: Run, *, corpus: CorpusSubset, run_dir: RunDir, notify: Notify) -> Tokenizer:
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
