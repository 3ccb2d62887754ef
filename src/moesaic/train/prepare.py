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
from moesaic.train.selection import Selection

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training reads; the same on every rank."""

    tokenizer: Tokenizer
    shards: TokenShards


def prepare(run: Run, *, folder: RunDir, world: World, say: Say) -> Prepared:
    """Build or open the corpus, then the run directory's tokenizer, then the cached shards.

    Rank 0 works and the others wait, so all must see the same files. Collective. Raises DataError
    or ConfigError.
    """

    def work() -> str:
        say("opening the corpus")
        chosen = Selection(run.corpus.open(), languages=run.languages)
        tokenizer = _tokenizer(run, chosen=chosen, folder=folder, say=say)
        say("opening the token shards (they are written the first time)")
        return str(cached_shards(chosen, tokenizer=tokenizer).path)

    shards = run_on_rank0(world, work)
    return Prepared(Tokenizer.load(folder.tokenizer), TokenShards.open(Path(shards)))


def _tokenizer(run: Run, *, chosen: Selection, folder: RunDir, say: Say) -> Tokenizer:
    if folder.tokenizer.is_file():
        tokenizer = Tokenizer.load(folder.tokenizer)
        _refuse_another(tokenizer, run=run, chosen=chosen, path=folder.tokenizer)
        return tokenizer
    say(f"training a tokenizer of {run.tokenizer.vocab_size:,} ids")
    texts = {
        code: (text.text for text in chosen.iter_texts(code, split="train"))
        for code in chosen.languages
    }
    tokenizer = train_tokenizer(texts, languages=chosen.languages, config=run.tokenizer)
    tokenizer.save(folder.tokenizer)
    return tokenizer


def _refuse_another(tokenizer: Tokenizer, *, run: Run, chosen: Selection, path: Path) -> None:
    problems = []
    if tokenizer.vocab_size != run.tokenizer.vocab_size:
        problems.append(
            f"tokenizer.vocab_size: {path} has {tokenizer.vocab_size} ids, the run asks for "
            f"{run.tokenizer.vocab_size}; remove the file to train another"
        )
    lacking = [code for code in chosen.languages if code not in tokenizer.languages]
    if lacking:
        problems.append(
            f"languages: {path} has no tag for {', '.join(lacking)}; remove it to train another"
        )
    if problems:
        raise ConfigError(problems)
